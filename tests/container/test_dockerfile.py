"""What can be said of the image without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def locked(path: Path) -> dict[str, str]:
    """Versions by name."""
    pins = re.findall(r"(?m)^([\w.-]+)==([^\s\\]+)", path.read_text())
    assert len(dict(pins)) == len(pins), f"{path.name} names a package twice"
    return dict(pins)


DEVELOPMENT = locked(ROOT / "constraints-dev.txt")
LOCKS = sorted(DOCKER.glob("requirements*.txt"))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_a_hash(path: Path) -> None:
    blocks = re.split(r"(?m)^(?=[a-z])", path.read_text())[1:]
    assert blocks
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)] == []


def test_image_holds_the_versions_that_the_tests_ran_with() -> None:
    ours = {**locked(DOCKER / "requirements.txt"), **locked(DOCKER / "requirements-build.txt")}
    assert {name: DEVELOPMENT.get(name) for name in ours} == ours, "run docker/lock.py"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_both_kinds_of_torch_are_of_one_version(kind: str) -> None:
    assert locked(DOCKER / f"requirements-{kind}.txt")["torch"].removesuffix("+cpu") == DEVELOPMENT["torch"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_image_holds_everything_that_the_project_asks_for(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {**locked(DOCKER / "requirements.txt"), **locked(DOCKER / f"requirements-{kind}.txt")}
    wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["moe"]]
    missing = [str(w) for w in wanted if pins.get(w.name.replace("_", "-"), "0") not in w.specifier]
    assert missing == [], "run docker/lock.py"


def test_no_package_is_locked_twice_for_an_image() -> None:
    shared = locked(DOCKER / "requirements.txt")
    for kind in ("cpu", "cuda"):
        assert shared.keys().isdisjoint(locked(DOCKER / f"requirements-{kind}.txt"))
