"""Outputs that are inputs by another path, and those that contain one another."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mergekit_ray
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import InputModel, Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.output.destination import MANIFEST_FILE, inspect
from mergekit_ray.output.places import check_apart
from mergekit_ray.storage.local.store import LocalStore
from support.models import contents

FILE = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / FILE).write_bytes(b"weights")
    return tmp_path / "model"


def check(model: Path, output: Path, *written: str) -> None:
    check_apart({str(model): [FILE]}, str(output), written)


@pytest.fixture
def bind() -> Iterator[Callable[[Path, Path], Path]]:
    """Mounts a folder at another place, too; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(folder: Path, at: Path) -> Path:
        at.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "--bind", folder, at], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("mounts need rights that this user does not have")
        mounted.append(at)
        return at

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


class TestFolders:
    def test_apart(self, model: Path, tmp_path: Path) -> None:
        for other in ("out", "model-2", "mode", "new/deep/er"):
            check(model, tmp_path / other)
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / FILE).write_bytes(b"weights")  # a copy is another file
        check(model, tmp_path / "there")

    @pytest.mark.parametrize("way", ["same", "dots", "slash", "link", "link above"])
    def test_the_same(self, model: Path, tmp_path: Path, way: str) -> None:
        places = {"same": model, "dots": tmp_path / "x" / ".." / "model", "link": tmp_path / "link"}
        (tmp_path / "x").mkdir()
        (tmp_path / "link").symlink_to(model)
        (tmp_path / "above").symlink_to(tmp_path)
        place = f"{model}/" if way == "slash" else str(places.get(way, tmp_path / "above" / "model"))
        with pytest.raises(PlanError, match="the output is one of the inputs") as caught:
            check_apart({str(model): [FILE]}, place)
        assert caught.value.where == place

    def test_a_bind_mount(self, model: Path, tmp_path: Path, bind: Callable[[Path, Path], Path]) -> None:
        place = bind(model, tmp_path / "volume")
        with pytest.raises(PlanError, match=f"the output is one of the inputs, {model}\n"):
            check(model, place)
        with pytest.raises(PlanError, match=f"the output is one of the inputs, {place}\n"):
            check(place, model)
        with pytest.raises(PlanError, match="the output is inside one of the inputs"):
            check(model, place / "merged")

    def test_a_bind_mount_of_what_is_above(
        self, model: Path, tmp_path: Path, bind: Callable[[Path, Path], Path]
    ) -> None:
        (tmp_path / "data").mkdir()
        model = model.rename(tmp_path / "data" / "model")
        place = bind(tmp_path / "data", tmp_path / "volume")
        with pytest.raises(PlanError, match="the output is one of the inputs"):
            check(model, place / "model")
        check(model, place / "merged")
        with pytest.raises(PlanError, match="an input is where the output's files would go"):
            check(model, place, "model/x.safetensors")

    def test_a_mounted_file(self, model: Path, tmp_path: Path, bind: Callable[[Path, Path], Path]) -> None:
        (tmp_path / "out").mkdir()
        place = tmp_path / "out" / "other.safetensors"
        place.touch()
        probe = bind(model, tmp_path / "probe")  # skips where nothing can be mounted
        subprocess.run(["mount", "--bind", probe / FILE, place], check=True)
        try:
            with pytest.raises(PlanError, match="is an input's file") as caught:
                check(model, tmp_path / "out")
        finally:
            subprocess.run(["umount", place], check=True)
        assert caught.value.where == str(place)

    @pytest.mark.parametrize("kind", ["hard", "symbolic"])
    def test_weights_that_are_linked(self, model: Path, tmp_path: Path, kind: str) -> None:
        (tmp_path / "out").mkdir()
        place = tmp_path / "out" / "model-00001-of-00001.safetensors"
        if kind == "hard":
            place.hardlink_to(model / FILE)
        else:
            place.symlink_to(model / FILE)
        with pytest.raises(PlanError, match=f"is an input's file, {model}/{FILE}") as caught:
            check(model, tmp_path / "out")
        assert caught.value.where == str(place)

    @pytest.mark.parametrize("name", ["merged", "deep/er", ".mergekit-ray/x"])
    def test_inside_of_an_input(self, model: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "link").symlink_to(model)
        for place in (model / name, tmp_path / "link" / name):
            with pytest.raises(PlanError, match=f"the output is inside one of the inputs, {model}"):
                check(model, place)

    def test_above_an_input(self, model: Path, tmp_path: Path) -> None:
        check(model, tmp_path, FILE, "config.json", "model-2/x")
        with pytest.raises(PlanError, match=f"an input is where the output's files would go: {model}"):
            check(model, tmp_path, "model/x.jinja")
        notes = tmp_path / ".mergekit-ray" / "digest"
        notes.mkdir(parents=True)
        for place in (notes, notes.parent):
            with pytest.raises(PlanError, match="an input is where"):
                check(place, tmp_path)


class TestPrefixes:
    @pytest.mark.parametrize("output", ["s3://b/m", "s3://b/m/"])
    def test_the_same(self, output: str) -> None:
        with pytest.raises(PlanError, match="the output is one of the inputs"):
            check_apart({"s3://b/m": []}, output)

    @pytest.mark.parametrize("model", ["hf://org/a", "hf://org/a@0123456789abcdef", "hf://Org/A@main"])
    def test_a_repository_at_any_commit(self, model: str) -> None:
        with pytest.raises(PlanError, match="the output is one of the inputs"):
            check_apart({model: []}, "hf://org/a")
        check_apart({model: []}, "hf://org/ab")

    @pytest.mark.parametrize(("model", "output"), [("s3://b/m", "s3://b/m/x"), ("s3://b", "s3://b/x/y")])
    def test_inside_of_an_input(self, model: str, output: str) -> None:
        with pytest.raises(PlanError, match=f"the output is inside one of the inputs, {model}"):
            check_apart({model: []}, output)

    @pytest.mark.parametrize(
        ("model", "output"),
        [
            ("s3://b/m", "s3://b"),  # models below a bucket's root, and another in it
            ("s3://b/m/x", "s3://b/m"),
            ("s3://b/m", "s3://b/m-2"),
            ("s3://b/m", "s3://b-2/m"),
            ("s3://b/m", "/b/m"),
            ("/b/m", "s3://b/m"),
        ],
    )
    def test_apart(self, model: str, output: str) -> None:
        check_apart({model: [FILE]}, output, [FILE])

    def test_where_files_of_the_output_go(self) -> None:
        for model in ("s3://b/.mergekit-ray/d/staged", "s3://b/additional_chat_templates"):
            with pytest.raises(PlanError, match="an input is where"):
                check_apart({model: []}, "s3://b", ["additional_chat_templates/x.jinja"])

    def test_spellings_that_the_store_takes_for_one(self) -> None:
        from mergekit_ray.storage.opening import open_sink

        for spelling in ("s3://b//m/", "S3://b/m", "s3://b/m//"):
            with pytest.raises(PlanError, match="the output is one of the inputs"):
                check_apart({"s3://b/m": []}, open_sink(spelling).uri)


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "c0ffee"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs" / "b").write_bytes(b"weights")
    (snapshot / FILE).symlink_to("../../blobs/b")
    inputs = {"hf://org/name@c0ffee": [FILE]}
    for place in (snapshot, snapshot / "x", snapshot.parents[1] / "blobs"):
        with pytest.raises(PlanError):
            check_apart(inputs, str(place))
    check_apart(inputs, str(tmp_path / "out"))
    model = InputModel("m", "org/name@c0ffee", "hf://org/name@c0ffee", {})  # whose commit the recipe names
    with pytest.raises(PlanError, match="the output is one of the inputs"):
        inspect(LocalStore(snapshot), Plan({"m": model}, (), {}, (), {}, 0), overwrite=True)


class TestMerges:
    """Through `inspect`, which every merge asks before it writes."""

    def test_a_folder_of_models_takes_another(self, models: list[Path], plan: Plan, tmp_path: Path) -> None:
        before = [contents(model) for model in models]
        recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
        options = MergeOptions(executor="local", overwrite=True)
        mergekit_ray.merge(recipe, tmp_path, options=options)
        mergekit_ray.merge({**recipe, "seed": 3}, tmp_path, options=options)
        assert [contents(model) for model in models] == before
        with pytest.raises(PlanError, match="is inside one of the inputs"):
            mergekit_ray.merge(recipe, models[1] / "merged", options=options)
        assert [contents(model) for model in models] == before

    def test_a_manifest_at_the_output_gives_away_no_file_of_others(
        self, models: list[Path], plan: Plan, tmp_path: Path
    ) -> None:
        sink = LocalStore(tmp_path)
        ours = ["tool.py", "additional_chat_templates/x.jinja"]
        names = [f"{models[0].name}/config.json", "thesis.docx", *ours]
        sink.put(MANIFEST_FILE, f'{{"side_files": {names}}}'.replace("'", '"').encode())
        for name in names[1:]:
            sink.put(name, b"x")
        found = inspect(sink, plan, overwrite=True)
        assert set(found.clear_last) == {MANIFEST_FILE, *ours}

    def test_an_adapter_is_not_extracted_into_a_model(self, models: list[Path]) -> None:
        from mergekit_ray.operations.extract_lora import extract_lora
        from mergekit_ray.operations.extract_options import ExtractOptions

        with pytest.raises(PlanError, match="is inside one of the inputs"):
            extract_lora(str(models[1]), str(models[0]), str(models[0] / "adapter"), ExtractOptions(rank=1))
