"""Families are tried by processes, one on each CPU at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from support.sweep.building import CannotBuildError
from support.sweep.columns import outcomes
from support.sweep.table import Result


def sweep(names: Sequence[str]) -> dict[str, Result]:
    """Try families, one on each CPU at a time, and say of each what came of it."""
    results: dict[str, Result] = {}
    num_workers = min(len(names), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_hush) as pool:
        for name, result in zip(names, pool.map(_tried, names), strict=True):
            results[name] = result
            say(f"{name}\n    {_told(result)}")
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


def say(text: str) -> None:
    """Print at once what is not empty."""
    sys.stdout.write(f"{text}\n" if text else "")
    sys.stdout.flush()
