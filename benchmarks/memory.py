"""Peak memory of merges of models of different sizes: it must not grow with the model.

    python -m benchmarks.memory [--shapes 1.1b 8b] [--methods linear ties] [--device cuda]

Models are noise and outputs are thrown away (see `benchmarks.endless`), so no disk is needed. Each merge
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.endless import SHAPES, register
from benchmarks.machine import describe_machine
from benchmarks.measure import measure

GB = 1e9
RECIPES = {
    "linear": ("", "weight: 0.4", ""),
    "slerp": ("0", "", "t: 0.4"),
    "task_arithmetic": ("0", "weight: 0.4", ""),
    "ties": ("0", "weight: 0.4, density: 0.5", ""),
    "dare_ties": ("0", "weight: 0.4, density: 0.5", ""),
    "breadcrumbs": ("0", "weight: 0.4, density: 0.5", ""),
    "della": ("0", "weight: 0.4, density: 0.5", ""),
    "sce": ("0", "", "select_topk: 0.5"),
    "model_stock": ("0", "", ""),
}
"""Base model, parameters of each model, parameters of all; two models and the base."""


def recipe(method: str, shape: str) -> str:
    """YAML of a merge of two models of a shape (slerp: of the base and one)."""
    base, per_model, general = RECIPES[method]
    inner = f", parameters: {{{per_model}}}" if per_model else ""
    lines = [f"merge_method: {method}", "dtype: bfloat16", *([f"base_model: noise://{shape}/{base}"] if base else [])]
    models = ("1",) if method == "slerp" else ("1", "2")
    lines += ["models:", *(f"  - {{model: noise://{shape}/{name}{inner}}}" for name in models)]
    return "\n".join([*lines, *([f"parameters: {{{general}}}"] if general else [])])


def run_one(file: Path, device: str, memory: str | None = None) -> None:
    """Merge into nothing, in this process."""
    register()
    from mergekit_ray.cli import merge_main  # noqa: PLC0415 - as the command line does, in the measured process only

    budget = [] if memory is None else ["--memory", memory]
    sys.argv = ["merge", str(file), "discard://out", "--quiet", "--device", device, *budget]
    merge_main()


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["1.1b", "8b"])
    parser.add_argument("--methods", nargs="*", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--device", default="cpu", help="what to compute on, as for merge")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_one(arguments.run, arguments.device, arguments.memory)
        return
    print(f"{describe_machine(Path(tempfile.gettempdir()))}")
    print("| method | " + " | ".join(f"{shape}: anonymous GB, s" for shape in arguments.shapes) + " |")
    print("|---|" + "---|" * len(arguments.shapes))
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            cells = []
            for shape in arguments.shapes:
                file = Path(folder) / f"{method}.yml"
                file.write_text(recipe(method, shape))
                command = [sys.executable, "-m", "benchmarks.memory", "--run", str(file), "--device", arguments.device]
                found = measure(command, log=Path(folder) / "log")
                cells.append(f"{found.peak_anonymous_bytes / GB:.2f}, {found.wall_seconds:.1f}")
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
