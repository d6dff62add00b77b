"""Sound files with one extreme value: every outcome is a result, or an error that tells what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.failures.hostile_values import TARGETS

TESTS = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_value_is_believed(target: str, tmp_path: Path) -> None:
    """In a process of its own, whose memory is bounded."""
    search = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "support.failures.hostile_values", target, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"},
    )
    assert done.returncode == 0, done.stderr
    *faults, tried = done.stdout.splitlines()
    assert not faults
    assert int(tried.removeprefix("tried ")) > 500
