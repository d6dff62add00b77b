"""Every family, and the page that says what came of it.

python -m support.sweep.run            # write docs/families.md
python -m support.sweep.run --check    # fail if it says something else, or if anything is wrong
python -m support.sweep.run qwen3 bart # only say what comes of these
"""

from __future__ import annotations

import argparse
import difflib
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from support.sweep.building import CannotBuildError, families
from support.sweep.columns import outcomes
from support.sweep.table import Result, page, wrong

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m support.sweep.run")
    parser.add_argument("families", nargs="*", help="only these, and only to say what comes of them")
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - families().keys():
        parser.error(f"transformers has no causal or multimodal family {', '.join(sorted(unknown))}")
    results = sweep(arguments.families or list(families()))
    if arguments.families:
        return int(bool(wrong(results)))
    if not arguments.check:
        PAGE.write_text(page(results), encoding="utf-8")
        return 0
    before = PAGE.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(before, page(results).splitlines(), str(PAGE), "found", lineterm="", n=0))
    _say("\n".join([*changes, *(f"WRONG: {each}" for each in wrong(results))]))
    return int(bool(changes or wrong(results)))


def sweep(names: Sequence[str]) -> dict[str, Result]:
    """Try families, one on each CPU at a time, and say of each what came of it."""
    results: dict[str, Result] = {}
    num_workers = min(len(names), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_hush) as pool:
        for name, result in zip(names, pool.map(_tried, names), strict=True):
            results[name] = result
            _say(f"{name}\n    {_told(result)}")
    return results


def _told(result: Result) -> str:
    if isinstance(result, str):
        return result
    return "\n    ".join(f"{column}: {outcome.status.value} {outcome.note}" for column, outcome in result.items())


def _tried(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return outcomes(name, Path(folder))
        except CannotBuildError as error:
            return str(error)


def _hush() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n" if text else "")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
