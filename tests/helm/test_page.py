"""Commands and values in docs/kubernetes.md are such as the chart takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from helm.charts import CHART, GIVEN, RECIPE, render
from helm.package_chart import find_helm

ROOT = CHART.parents[1]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
VALUES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r"\s*helm (install|upgrade) my-merge", line)]


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    values = yaml.safe_load(text)
    assert len(render({**GIVEN, **values})) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(RECIPE)
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    _, verb, *words = shlex.split(command)
    if verb == "upgrade":  # renders what a former installation was given
        words = ["--set-file=recipe.content=recipe.yml" if word == "--reuse-values" else word for word in words]
    done = subprocess.run([find_helm(), "template", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_security_can_be_left_to_the_cluster() -> None:
    [option] = re.findall(r"--set (security\S+)`", PAGE)
    done = subprocess.run(
        [find_helm(), "template", "x", str(CHART), "-f", str(CHART.parent / "ci/default.yaml"), "--set", option],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "runAsUser" not in done.stdout


def test_there_is_something_to_test() -> None:
    assert len(VALUES) >= 10
    assert len(COMMANDS) >= 3


def test_links() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
