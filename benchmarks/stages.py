"""Three stages over models of 1.1B: in one pass, as three merges, and by mergekit-multi.

    python -m benchmarks.stages FOLDER --mergekit-python .venv-mergekit/bin/python   # 16 GB below FOLDER

Two linear merges of two models each, and their slerp. The contenders run in turns. Inputs are in the page cache, what
was written is deleted and synced away between runs, and times include start-up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.llama_1b import make_models, weight_files
from benchmarks.machine import describe_machine
from benchmarks.measure import Measurement, measure

ONE_PASS, APART, MERGEKIT = "one pass", "three merges", "mergekit-multi"
OURS: Final = [sys.executable, "-c", "from mergekit_ray.cli import merge_main; merge_main()"]


def stages(base: Path, a: Path, b: Path, c: Path) -> list[dict[str, Any]]:
    """The recipe, a document for each stage."""

    def linear(name: str, *models: Path) -> dict[str, Any]:
        listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
        return {"name": name, "merge_method": "linear", "models": listed, "dtype": "bfloat16"}

    last = {
        "merge_method": "slerp",
        "base_model": "one",
        "models": [{"model": "one"}, {"model": "two"}],
        "parameters": {"t": 0.4},
        "dtype": "bfloat16",
    }
    return [linear("one", base, a), linear("two", b, c), last]


def one_pass(recipe: list[dict[str, Any]], work: Path) -> Measurement:
    """All stages as one plan."""
    (work / "recipe.yml").write_text(yaml.safe_dump_all(recipe))
    return measure([*OURS, str(work / "recipe.yml"), str(work / "out"), "--quiet"], log=work / "log")


def apart(recipe: list[dict[str, Any]], work: Path) -> Measurement:
    """A merge for each stage, the last of which reads what the others wrote."""
    found = []
    for number, stage in enumerate(recipe):
        named = {key: value for key, value in stage.items() if key != "name"}
        text = yaml.safe_dump(named)
        for other in ("one", "two"):
            text = text.replace(f"model: {other}\n", f"model: {work / other}\n")
        (work / "recipe.yml").write_text(text)
        out = work / stage.get("name", "out")
        found.append(measure([*OURS, str(work / "recipe.yml"), str(out), "--quiet"], log=work / f"log{number}"))
    return replace(
        max(found, key=lambda each: each.peak_anonymous_bytes),
        wall_seconds=sum(each.wall_seconds for each in found),
        cpu_seconds=sum(each.cpu_seconds for each in found),
    )


def by_mergekit(python: Path) -> Callable[[list[dict[str, Any]], Path], Measurement]:
    """mergekit-multi of a virtual environment."""

    def run(recipe: list[dict[str, Any]], work: Path) -> Measurement:
        (work / "recipe.yml").write_text(yaml.safe_dump_all(recipe))
        command = [str(python.parent / "mergekit-multi"), str(work / "recipe.yml")]
        return measure([*command, "-I", str(work / "between"), "--out-path", str(work / "out")], log=work / "log")

    return run


def main() -> None:
    """Prints a line for each contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit-python", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    models = make_models(options.folder / "models")
    recipe = stages(*models)
    contenders: dict[str, Callable[[list[dict[str, Any]], Path], Measurement]] = {ONE_PASS: one_pass, APART: apart}
    if options.mergekit_python is not None:
        contenders[MERGEKIT] = by_mergekit(options.mergekit_python.absolute())
    print(describe_machine(options.folder))
    for model in models:
        for file in weight_files(model):
            file.read_bytes()
    found: dict[str, list[Measurement]] = {name: [] for name in contenders}
    written = {}
    for _ in range(options.turns):
        for name, run in contenders.items():
            work = options.folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            os.sync()
            found[name].append(run(recipe, work))
            written[name] = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    shutil.rmtree(options.folder / "work")
    for name, measured in found.items():
        walls = [each.wall_seconds for each in measured]
        memory = max(each.peak_anonymous_bytes for each in measured) / 1e9
        print(
            f"{name:<16} best {min(walls):6.2f} s, median {statistics.median(walls):6.2f} s, "
            f"written {written[name] / 1e9:4.1f} GB, anonymous memory {memory:4.2f} GB"
        )


if __name__ == "__main__":
    main()
