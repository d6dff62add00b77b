"""Outputs on a file system that does not tell the case of letters: no file is taken for another, or lost to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.storage.local.store import LocalSource
from support.models import contents

KINDS = {"respects case": True, "ignores case": False}


@pytest.fixture(params=KINDS)
def respects_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not KINDS[request.param]:
        path_of = LocalSource._path

        def folded(self: LocalSource, name: str) -> Path:
            found = Path(self.uri)
            for part in path_of(self, name).relative_to(found).parts:
                there = [each.name for each in found.iterdir()] if found.is_dir() else []
                found /= next((each for each in there if each.casefold() == part.casefold()), part)
            return found

        monkeypatch.setattr(LocalSource, "_path", folded)
    return KINDS[request.param]


def merge(plan: Plan, out: Path, *, overwrite: bool = False) -> None:
    run_plan(plan, str(out), MergeOptions(executor="local", overwrite=overwrite))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["readme.md", "Config.json", "MODEL.safetensors.index.json"])
def test_a_file_that_is_there(name: str, overwrite: bool, plan: Plan, tmp_path: Path, respects_case: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("the user's")
    if respects_case:
        merge(plan, out, overwrite=True)
    else:
        with pytest.raises(PlanError, match=rf"{name} and .* are one file here") as caught:
            merge(plan, out, overwrite=overwrite)
        assert "rename or remove it" in str(caught.value.remedy)
        assert [path.name for path in out.iterdir()] == [name]
    if "index" not in name:
        assert (out / name).read_text() == "the user's"


@pytest.mark.parametrize("is_replacing", [False, True])
def test_files_that_are_to_be_written(is_replacing: bool, plan: Plan, tmp_path: Path, respects_case: bool) -> None:
    out = tmp_path / "out"
    if is_replacing:
        merge(plan, out)
    before = contents(out) if is_replacing else {}
    twins = replace(plan, generated_files={"LICENSE": "a", "License": "bc", "notice.json": "d"})
    if respects_case:
        merge(twins, out, overwrite=True)
        found = contents(out)
        assert (found["LICENSE"], found["License"]) == (b"a", b"bc")
    else:
        with pytest.raises(PlanError, match="LICENSE and License are one file here") as caught:
            merge(twins, out, overwrite=True)
        assert "beside the model that they are copied from" in str(caught.value.remedy)
        assert {name: data for name, data in contents(out).items() if "/" not in name} == before
        assert not list(out.rglob("*.safetensors.json")), "a shard was written in vain"


def test_nothing_else_is_different(plan: Plan, tmp_path: Path, respects_case: bool) -> None:
    del respects_case
    merge(plan, tmp_path / "out")
    whole = contents(tmp_path / "out")
    other = replace(plan, seed=3)
    merge(other, tmp_path / "out", overwrite=True)
    merge(plan, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == whole
