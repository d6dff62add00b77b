"""The script of `helm test` works with the package as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helm.charts import CHART
from support.merging import COMMANDS
from support.waiting import DEADLINE_SECONDS

SCRIPT = CHART / "files" / "tiny_merge.py"


def run(path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def test_it_passes_with_the_package() -> None:
    done = run(f"{COMMANDS}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "all as written" in done.stdout


def test_it_fails_if_the_result_is_wrong(tmp_path: Path) -> None:
    # Instead of a merge, the first model as it is.
    fake = tmp_path / "merge"
    fake.write_text('#!/bin/sh\nmkdir "$2" && cp "$(dirname "$1")"/first/* "$2"\n')
    (tmp_path / "mergekit-ray").write_text("#!/bin/sh\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    done = run(f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 1
    assert "wrong values" in done.stderr
