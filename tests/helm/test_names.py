"""One name and version of image, chart and package wherever they are written."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import mergekit_ray
from helm.charts import CHART, GIVEN, ROOT, pods_of, render

VERSION = mergekit_ray.__version__
IMAGE = "ghcr.io/mergekit-ray/mergekit-ray"
RAW = "https://raw.githubusercontent.com/mergekit-ray/mergekit-ray/main/"

FOLDERS = (".github", "configs", "deploy", "docker", "docs", "examples", "helm", "mergekit_ray", "release")
"""Whose files are read. Tests name versions that are wrong."""
SUFFIXES = {".md", ".yaml", ".yml", ".sh", ".py", ".ipynb", ".toml", ".tpl", ".txt", ""}

_NUMBER = r"v?(\d+\.\d+\.\d+(?:[-.+]?(?:a|b|rc|dev|post)\d*)?)"
VERSIONS = re.compile(
    "|".join(
        [
            rf"mergekit[-_]ray(?:\[[\w,]+\])?(?:==|:|-|@|/releases/tag/|\.git@){_NUMBER}",
            rf"mergekit-ray\S*\s+--version[ =]{_NUMBER}",
            rf"(?:imageTag|appVersion): {_NUMBER}",
        ]
    )
)
IMAGES = re.compile(r"(?<![\w/.-])(?:oci://)?((?:[\w.-]+/)*mergekit-ray):(\w[\w.-]*)")


def documents() -> Iterator[tuple[str, str]]:
    """All texts of the repository that may name a version, by path."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    for path in [*ROOT.glob("*"), *inside]:
        # The changelog names former versions.
        if path.is_file() and path.suffix in SUFFIXES and path.name not in {"CHANGELOG.md", "requirements.txt"}:
            yield str(path.relative_to(ROOT)), re.sub(r"\\\n *", "", path.read_text())


def found_in(text: str) -> list[str]:
    """The versions of ours that a text names."""
    return [next(filter(None, match.groups())) for match in VERSIONS.finditer(text)]


def test_nothing_names_a_version_that_is_not_there() -> None:
    found = [(name, version) for name, text in documents() for version in found_in(text)]
    assert len(found) > 10
    assert {(name, version) for name, version in found if version != VERSION} == set()


@pytest.mark.parametrize(
    "text",
    [
        "pip install mergekit-ray==9.8.7",
        "pip install 'mergekit-ray[moe]==9.8.7'",
        "[/shared/mergekit_ray-9.8.7-py3-none-any.whl]",
        "ghcr.io/mergekit-ray/mergekit-ray:9.8.7-cuda",
        "https://github.com/mergekit-ray/mergekit-ray/releases/tag/v9.8.7",
        "pip install git+https://github.com/mergekit-ray/mergekit-ray.git@v9.8.7",
        "helm install x oci://ghcr.io/mergekit-ray/charts/mergekit-ray --version 9.8.7 -f v",
        "imageTag: 9.8.7-cuda",
        "mergekit-ray-9.8.7.tgz",
    ],
)
def test_the_search_finds_versions(text: str) -> None:
    assert found_in(text) == ["9.8.7"]


def test_images_have_one_name() -> None:
    tags = {VERSION, f"{VERSION}-cuda"}
    named = {(name, *match.groups()) for name, text in documents() for match in IMAGES.finditer(text)}
    assert {each for each in named if each[1] != IMAGE or each[2] not in tags} == set()
    assert {each[0] for each in named} >= {"docs/container.md", "deploy/job.yaml"}


def test_chart_runs_the_image_that_the_script_builds() -> None:
    assert {each.container["image"] for each in pods_of(render(GIVEN))} == {f"{IMAGE}:{VERSION}"}
    # The script reads the name from the chart, as this test does.
    script = (ROOT / "docker/build.sh").read_text()
    [reads] = re.findall(r"sed -n '(s/\^  repository: .*?)' helm/mergekit-ray/values.yaml", script)
    read = subprocess.run(["sed", "-n", reads, str(CHART / "values.yaml")], capture_output=True, text=True, check=True)
    assert read.stdout == f"{IMAGE}\n"
    assert IMAGE in (ROOT / ".github/workflows/release.yml").read_text()


def test_chart_says_where_it_comes_from() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    assert chart["home"] in chart["sources"]
    assert chart["maintainers"]
    icon = Path(ROOT, chart["icon"].removeprefix(RAW))
    assert icon.suffix == ".svg"
    assert icon.read_text().startswith("<svg ")
