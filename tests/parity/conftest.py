"""The two programs, and the checkpoints that they merge."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from parity.checkpoints import make_family
from parity.recipes import Recipe

REPOSITORY = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("entry_server.py")
OURS = "mergekit_ray.cli:merge_main"
OUR_MODULES = tuple(
    f"mergekit_ray.{name}"
    for name in ("operations.merge", "operations.write_shards", "executors.local", "methods.compiled.formula_loops")
)
"""What a merge imports as it goes, at five times the cost of merging the models here."""

THEIRS = "mergekit-yaml"


class Program:
    """A console script, run many times by one warm interpreter (see entry_server.py)."""

    def __init__(self, python: Path, script: str, modules: Sequence[str] = ()) -> None:
        # mergekit walks sets, whose order follows the hash seed. The Hub is out of bounds for both.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [str(python), str(SERVER), script, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._script = script
        if self._answer() != "ready":
            raise RuntimeError(f"{python} cannot run {script}")

    def run(self, *args: str | Path, log: Path) -> None:
        """Runs the script with ``args``; fails the test if it does not exit with 0."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps({"args": [str(arg) for arg in args], "log": str(log)}) + "\n")
        stdin.flush()
        code = self._answer()
        if code != "0":
            pytest.fail(f"{self._script} exited with {code}:\n{log.read_text(errors='replace')[-3000:]}")

    def close(self) -> None:
        """Ends the interpreter."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def mergekit_python() -> Path:
    """The Python of mergekit's own environment: the one that MERGEKIT_PYTHON names, or that ``make parity`` made."""
    named = os.environ.get("MERGEKIT_PYTHON")
    python = Path(named or REPOSITORY / ".venv-mergekit/bin/python")
    if not python.exists():
        if named:
            pytest.fail(f"MERGEKIT_PYTHON names {python}, which does not exist")
        pytest.skip("mergekit is not there to compare with: `make parity` installs it apart and runs these tests")
    return python


def of_mergekit(script: str) -> Iterator[Program]:
    """A script in mergekit's own environment."""
    program = Program(mergekit_python(), script)
    yield program
    program.close()


@pytest.fixture(scope="session")
def mergekit() -> Iterator[Program]:
    """``mergekit-yaml``."""
    yield from of_mergekit(THEIRS)


@pytest.fixture(scope="session")
def tokensurgeon() -> Iterator[Program]:
    """``mergekit-tokensurgeon``."""
    yield from of_mergekit("mergekit-tokensurgeon")


@pytest.fixture(scope="session")
def multi() -> Iterator[Program]:
    """``mergekit-multi``."""
    yield from of_mergekit("mergekit-multi")


@pytest.fixture(scope="session")
def pytorch() -> Iterator[Program]:
    """``mergekit-pytorch``."""
    yield from of_mergekit("mergekit-pytorch")


@pytest.fixture(scope="session")
def mergekit_ray() -> Iterator[Program]:
    """Our own ``merge``."""
    program = Program(Path(sys.executable), OURS, OUR_MODULES)
    yield program
    program.close()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Folders of a family's checkpoints by name, made when first asked for."""
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, dict[str, Path]] = {}

    def places(name: str) -> dict[str, Path]:
        if name not in made:
            made[name] = make_family(name, folder)
        return made[name]

    return places


Merged = tuple[Path, Path]
"""Output folders: ours, theirs."""


@pytest.fixture
def merge_both(
    mergekit: Program, mergekit_ray: Program, family: Callable[[str], dict[str, Path]], tmp_path: Path
) -> Callable[..., Merged]:
    """Merges a recipe with both programs."""

    def merge(recipe: Recipe, extra: str) -> Merged:
        folder = tmp_path / recipe.name
        folder.mkdir()
        file = _write(recipe, extra, family(recipe.family), folder / "recipe.yml")
        ours, theirs = folder / "ours", folder / "theirs"
        mergekit.run(file, theirs, "--quiet", "--random-seed", "1", log=folder / "theirs.log")
        mergekit_ray.run(file, ours, "--quiet", log=folder / "ours.log")
        return ours, theirs

    return merge


MergeOurs = Callable[[Recipe, str], Path]


@pytest.fixture
def merge_ours(mergekit_ray: Program, family: Callable[[str], dict[str, Path]], tmp_path: Path) -> MergeOurs:
    """Merges a recipe with mergekit-ray alone."""

    def merge(recipe: Recipe, extra: str) -> Path:
        file = _write(recipe, extra, family(recipe.family), tmp_path / "alone.yml")
        mergekit_ray.run(file, tmp_path / "alone", "--quiet", log=tmp_path / "alone.log")
        return tmp_path / "alone"

    return merge


def _write(recipe: Recipe, extra: str, places: dict[str, Path], file: Path) -> Path:
    # Not str.format: the recipes are full of braces.
    text = re.sub(r"\{(base|a|b|c)\}", lambda match: str(places[match[1]]), recipe.text)
    file.write_text(text + extra)
    return file
