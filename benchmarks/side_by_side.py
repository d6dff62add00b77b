"""mergekit and mergekit-ray on the same merges, run in turns on one machine.

    python -m benchmarks.side_by_side --mergekit-python .venv-mergekit/bin/python

Inputs are in the page cache, outputs are deleted and synced away between runs, and the contenders alternate, so that a
busy spell of the machine falls on both. mergekit is run as a user runs it, from its own virtual environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import mergekit_ray
from benchmarks.llama_1b import is_whole, make_models, weight_files
from benchmarks.machine import describe_machine, describe_versions, touch_memory
from benchmarks.measure import CommandError, Measurement, measure

GB = 1e9
COPY_BYTES = 8 << 20

MERGEKIT, MERGEKIT_FASTEST, OURS = "mergekit", "mergekit, its fastest", "mergekit-ray"
FASTEST_OPTIONS = ("--out-shard-size", "500M", "--async-write")


@dataclass(frozen=True)
class Case:
    """One merge to measure.

    Attributes:
        name: the method and how many fine-tunes it merges.
        recipe: YAML with ``$base``, ``$a``, ``$b``, ``$c`` for the models' folders.
        num_inputs: how many models it reads.
        contenders: who runs it.
        mergekit_widens: mergekit writes float32 whatever the recipe says.
    """

    name: str
    recipe: str
    num_inputs: int
    contenders: tuple[str, ...] = (MERGEKIT, OURS)
    mergekit_widens: bool = False


def _models(names: str, parameters: str = "") -> str:
    inner = f", parameters: {{{parameters}}}" if parameters else ""
    return "models:\n" + "".join(f"  - {{model: ${name}{inner}}}\n" for name in names)


def _case(
    method: str,
    names: str,
    parameters: str = "",
    settings: str = "",
    *,
    base: str = "",
    contenders: tuple[str, ...] = (),
) -> Case:
    """A merge of the models ``names`` with the same parameters for each."""
    head = f"merge_method: {method}\n" + (f"base_model: ${base}\n" if base else "")
    top = f"parameters: {{{settings}}}\n" if settings else ""
    num_tunes = len(set(names) - {base})
    return Case(
        f"{method}{len(names) if method in _OF_TWO else num_tunes}",
        head + _models(names, parameters) + top + "dtype: bfloat16\n",
        len({*names, base} - {""}),
        contenders or (MERGEKIT, OURS),
        mergekit_widens=method in ("arcee_fusion", "ramplus_tl"),
    )


_OF_TWO = ("slerp", "nearswap", "arcee_fusion")
"""Methods whose base is one of the models that are merged."""


CASES = (
    Case(
        "linear2",
        "merge_method: linear\nmodels:\n  - {model: $a, parameters: {weight: 0.6}}\n"
        "  - {model: $b, parameters: {weight: 0.4}}\ndtype: bfloat16\n",
        2,
        (MERGEKIT, MERGEKIT_FASTEST, OURS),
    ),
    _case("slerp", "ab", settings="t: 0.4", base="a"),
    _case("nuslerp", "ab", "weight: 0.4"),
    _case("multislerp", "abc", "weight: 0.4"),
    _case("karcher", "abc"),
    _case("nearswap", "ab", settings="t: 0.001", base="a"),
    _case("arcee_fusion", "ab", base="a"),
    _case("model_stock", "abc", base="base"),
    _case("task_arithmetic", "abc", "weight: 0.4", base="base"),
    _case("ties", "abc", "weight: 0.4, density: 0.5", base="base"),
    _case("dare_linear", "abc", "weight: 0.4, density: 0.5", base="base"),
    _case("dare_ties", "abc", "weight: 0.4, density: 0.5", base="base"),
    _case("breadcrumbs", "abc", "weight: 0.4, density: 0.5, gamma: 0.01", base="base"),
    _case("breadcrumbs_ties", "abc", "weight: 0.4, density: 0.5, gamma: 0.01", base="base"),
    _case("della", "abc", "weight: 0.4, density: 0.5, epsilon: 0.15", base="base"),
    _case("della_linear", "abc", "weight: 0.4, density: 0.5, epsilon: 0.15", base="base"),
    _case("sce", "abc", settings="select_topk: 0.5", base="base"),
    _case("ram", "abc", base="base"),
    _case("ramplus_tl", "abc", base="base"),
)


@dataclass
class Results:
    """All measurements, by case and contender, beside the floor of each case in seconds."""

    runs: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)

    def best(self, case: str, contender: str) -> Measurement | None:
        """The quickest run, if there was one."""
        return min(self.runs.get((case, contender), ()), key=lambda run: run.wall_seconds, default=None)

    def median_wall_seconds(self, case: str, contender: str) -> float:
        """Median wall time of the runs."""
        return statistics.median(run.wall_seconds for run in self.runs[case, contender])


def command_of(contender: str, recipe: Path, output: Path, mergekit_python: Path) -> list[str]:
    """The command line by which ``contender`` merges ``recipe`` into ``output``."""
    if contender == OURS:
        entry = "from mergekit_ray.cli import merge_main; merge_main()"
        return [sys.executable, "-c", entry, str(recipe), str(output), "--quiet"]
    options = FASTEST_OPTIONS if contender == MERGEKIT_FASTEST else ()
    return [str(mergekit_python.parent / "mergekit-yaml"), str(recipe), str(output), "--quiet", *options]


def run_case(case: Case, contender: str, models: list[Path], work: Path, mergekit_python: Path) -> Measurement:
    """One run of one contender; its output is checked for completeness, then deleted.

    Raises:
        CommandError: the command failed or left incomplete files.
    """
    recipe, output = work / f"{case.name}.yml", work / "output"
    base, a, b, c = models
    recipe.write_text(Template(case.recipe).substitute(base=base, a=a, b=b, c=c))
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # one contender's dirty pages must not be flushed during the other's run
    for model in models:
        read_all(weight_files(model))
    measurement = measure(
        command_of(contender, recipe, output, mergekit_python),
        log=work / f"{case.name}-{contender.replace(', ', '-').replace(' ', '-')}.log",
        environment={"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    written = weight_files(output)
    written_bytes = sum(file.stat().st_size for file in written)
    expected_bytes = sum(file.stat().st_size for file in weight_files(base))
    if case.mergekit_widens and contender != OURS:
        expected_bytes *= 2
    if not written or abs(written_bytes - expected_bytes) > 1 << 20 or not all(is_whole(file) for file in written):
        raise CommandError(f"{contender} left {written_bytes} bytes in {output}, expected about {expected_bytes}")
    shutil.rmtree(output)
    return measurement


def compile_modules(python: Path, folders: Iterable[Path] = ()) -> None:
    """Have all of an environment compiled, as pip leaves it: `make setup` does not, nor does a process everywhere."""
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    # Not checked: packages hold files that are no Python, for tests and as templates.
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", packages, *map(str, folders)], check=False)


def read_all(files: Iterable[Path]) -> None:
    """Reads files and forgets them, which leaves them in the page cache."""
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)


def floor_seconds(inputs: list[Path], work: Path) -> float:
    """What no merge can beat: ``cat`` of the inputs from the page cache and a write of as much as one model holds."""
    files = [file for model in inputs for file in weight_files(model)]
    with files[0].open("rb") as stream:
        block = stream.read(COPY_BYTES)
    output_bytes = sum(file.stat().st_size for file in weight_files(inputs[0]))
    target = work / "floor.bin"
    os.sync()
    start = time.perf_counter()
    read_all(files)
    with target.open("wb", buffering=0) as stream:
        for _ in range(output_bytes // COPY_BYTES):
            stream.write(block)
    elapsed = time.perf_counter() - start
    target.unlink()
    return elapsed


def table(results: Results, cases: Iterable[Case]) -> str:
    """Results as a markdown table."""
    lines = [
        "| merge | contender | wall s, best | median | CPU s | peak RSS GB | anonymous GB | floor s | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        reference = results.best(case.name, MERGEKIT)
        floor = min(results.floors[case.name])
        for contender in case.contenders:
            best = results.best(case.name, contender)
            if best is None:
                continue
            faster = f"{reference.wall_seconds / best.wall_seconds:.1f}" if reference else ""
            lines.append(
                f"| {case.name} | {contender} | {best.wall_seconds:.1f} "
                f"| {results.median_wall_seconds(case.name, contender):.1f} | {best.cpu_seconds:.1f} "
                f"| {best.peak_rss_bytes / GB:.2f} | {best.peak_anonymous_bytes / GB:.2f} | {floor:.1f} | {faster} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, writes everything measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for models and outputs: 13 GB")
    parser.add_argument("--mergekit-python", type=Path, default=Path(".venv-mergekit/bin/python"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES], help="merges to measure")
    parser.add_argument("--contenders", nargs="*", choices=["mergekit", "ours"], default=["mergekit", "ours"])
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    # Not resolved: a virtual environment's python is a link, and its folder is what holds mergekit-yaml.
    mergekit_python: Path = arguments.mergekit_python.absolute()
    compile_modules(Path(sys.executable), [Path(mergekit_ray.__file__).parent])
    compile_modules(mergekit_python)
    models = make_models(work / "models")
    touch_memory()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]

    results = Results()
    for repeat in range(arguments.repeats):
        for case in cases:
            results.floors.setdefault(case.name, []).append(floor_seconds(models[-case.num_inputs :], work))
            for contender in case.contenders:
                if ("ours" if contender == OURS else "mergekit") not in arguments.contenders:
                    continue
                measurement = run_case(case, contender, models, work, mergekit_python)
                results.runs.setdefault((case.name, contender), []).append(measurement)
                print(
                    f"{repeat + 1}/{arguments.repeats} {case.name} {contender}: {measurement.wall_seconds:.1f} s wall, "
                    f"{measurement.cpu_seconds:.1f} s CPU, {measurement.peak_rss_bytes / GB:.2f} GB RSS, "
                    f"{measurement.peak_anonymous_bytes / GB:.2f} GB anonymous",
                    flush=True,
                )

    machine, versions = describe_machine(work), describe_versions(mergekit_python)
    print(f"\n{machine}\n{versions}\n\n{table(results, cases)}")
    report = {
        "machine": machine,
        "versions": versions,
        "floor_seconds": results.floors,
        "runs": [
            {"case": case, "contender": contender, **run.to_json()}
            for (case, contender), runs in results.runs.items()
            for run in runs
        ],
    }
    (work / "side_by_side.json").write_text(json.dumps(report, indent=2))
    print(f"\nAll runs: {work / 'side_by_side.json'}")


if __name__ == "__main__":
    main()
