"""The image under test, built once, and models for it.

Environment variables:
    MERGEKIT_RAY_IMAGE: an existing image, to be tested instead of one built from this tree.
    MERGEKIT_RAY_BUILD: options of ``docker/build.sh``, as a shell takes them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from container.engine import ROOT, Image, missing
from support.merging import recipe_of
from support.models import ModelLibrary

_TAG = "localhost/mergekit-ray:tested"
_untested: list[str] = []


@pytest.fixture(scope="session")
def image() -> Image:
    """The image."""
    obstacle = missing()
    if obstacle:
        _untested.append(obstacle)
        pytest.skip(obstacle)
    given = os.environ.get("MERGEKIT_RAY_IMAGE")
    if not given:
        options = shlex.split(os.environ.get("MERGEKIT_RAY_BUILD", ""))
        command = [str(ROOT / "docker/build.sh"), "--tag", _TAG, *options]
        built = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert built.returncode == 0, f"{shlex.join(command)}\n{built.stdout[-8000:]}"
    return Image(given or _TAG)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that anybody may read: three models and ``recipe.yml``, which names them as seen from that folder.

    The names are part of what random masks are made from, so they must be the same in a container and outside.
    """
    folder = tmp_path_factory.mktemp("inputs")
    library = ModelLibrary(folder)
    base, *tuned = (Path(library.get("llama", variant, with_tokenizer=True).name) for variant in range(3))
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe_of("dare_ties", base, tuned)))
    (folder / "wrong.yml").write_text("merge_method: dare_tise\nmodels: []\n")
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """An image that nobody looked at must not pass for one that works."""
    for obstacle in dict.fromkeys(_untested):
        terminalreporter.section("THE CONTAINER IMAGE WAS NOT BUILT AND NOT TESTED", red=True, bold=True)
        terminalreporter.line(obstacle, red=True, bold=True)
