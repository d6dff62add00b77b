"""The packaged chart: the same bytes each time, and the same manifests as the folder."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from helm.charts import CHART, render, rendered, values_of
from helm.package_chart import package


def test_same_files_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "elsewhere" / "mergekit-ray"
    shutil.copytree(CHART, copy)
    for file in copy.rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
        file.chmod(0o700)
    (copy / "values.yaml~").write_text("an editor's backup")
    archives = []
    for name, chart in (("first", CHART), ("second", copy)):
        (tmp_path / name).mkdir()
        archives.append(package(tmp_path / name, chart=chart))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    (tmp_path / "third").mkdir()
    with tarfile.open(package(tmp_path / "third")) as archive:
        assert {member.mtime for member in archive.getmembers()} == {1_700_000_000}
        names = archive.getnames()
    assert {Path(name).parts[0] for name in names} == {"mergekit-ray"}
    assert "mergekit-ray/Chart.yaml" in names
    assert not [name for name in names if "~" in name or "pycache" in name]


def test_package_renders_as_the_folder_does(tmp_path: Path) -> None:
    archive = package(tmp_path)
    assert render(values_of("everything"), chart=archive) == list(rendered("everything"))
