"""Machine code that is kept is that of the sources as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_ray
from mergekit_ray.methods.compiled import jit

CALL = """
import numpy as np
from mergekit_ray.methods.compiled import election
base = np.zeros(4, np.float32)
one = np.ones(1, np.float32)
election.add_elected(base, (np.ones(4, np.float32),), one, one, np.float32(1), np.float32(np.inf))
print(base[0])
"""


def called(package: Path, cache: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", CALL], env=environment, cwd=package, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_code_is_compiled_anew_where_another_file_has_changed(tmp_path: Path) -> None:
    """Loops take in parts of each other's; the time of the file they are in says nothing of these."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mergekit_ray.__file__).parent, package / "mergekit_ray", ignore=ignored)
    folder = package / "mergekit_ray" / "methods" / "compiled"
    (folder / "added.py").write_text(
        "from mergekit_ray.methods.compiled.jit import compiled\n\n\n@compiled\ndef added() -> float:\n    return 1.0\n"
    )
    election = folder / "election.py"
    election.write_text(
        election.read_text()
        .replace("import compiled\n", "import compiled\nfrom mergekit_ray.methods.compiled.added import added\n", 1)
        .replace("run[i] += scale * merged[i] * signs[i]", "run[i] += added()", 1)
    )
    assert called(package, cache) == "1.0"
    (folder / "added.py").write_text((folder / "added.py").read_text().replace("1.0", "2.0"))
    assert called(package, cache) == "2.0"


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    found = set()
    for name, files in {
        "empty": {},
        "a": {"a.py": "x"},
        "b": {"b.py": "x"},
        "both": {"a.py": "x", "b.py": "x"},
        "other": {"a.py": "y"},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
        (tmp_path / name / "notes.txt").write_text(name)
        found.add(jit.sources_digest(tmp_path / name))
    assert len(found) == 5
