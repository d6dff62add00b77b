"""How far from the exact result mergekit and mergekit-ray are, by method, for recipes with ``dtype: bfloat16``.

    python -m benchmarks.accuracy --mergekit-python .venv-mergekit/bin/python

Small Llama checkpoints stored in float32, recipes of ``tests/parity``. The error of a tensor is its root mean square
difference from the formula in float64, relative to its root mean square, and the figures are means over tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

TESTS = Path(__file__).parents[1] / "tests"


class Collector:
    """Picks the errors out of the tests' reports."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        for key, value in report.user_properties:
            if key == "accuracy" and report.when == "call" and isinstance(value, tuple):
                method, _, ours, theirs = value
                self.found[method].append((ours, theirs))


def main() -> int:
    """Runs the comparison and prints the table; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", type=Path, default=Path(".venv-mergekit/bin/python"))
    os.environ["MERGEKIT_PYTHON"] = str(parser.parse_args().mergekit_python.absolute())
    collector = Collector()
    code = pytest.main(["-q", "-m", "parity", str(TESTS / "parity/test_accuracy.py")], plugins=[collector])
    lines = ["| method | mergekit | mergekit-ray | times closer |", "|---|---|---|---|"]
    for method, pairs in collector.found.items():
        ours, theirs = (mean(column) for column in zip(*pairs, strict=True))
        lines.append(f"| {method} | {theirs:.1e} | {ours:.1e} | {theirs / ours:.1f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
