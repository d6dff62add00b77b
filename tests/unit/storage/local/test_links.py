"""Which links in a model's folder are followed, and what is said of the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.checkpoint.opening import open_checkpoint
from mergekit_ray.core.errors import CheckpointError, PlanError, StorageError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.storage.local.links import LINKS_VARIABLE
from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.opening import open_sink, open_source
from support.memory_inputs import random_llama, write_model

BLOB = "ab" * 20
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that is no model's."""
    path = tmp_path / "etc" / "shadow"
    path.parent.mkdir()
    path.write_text("root:sesame")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", random_llama(0), CONFIG, tokenizer__json="{}")


def link(path: Path, target: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


def reads(source: LocalSource, name: str) -> dict[str, Callable[[], Any]]:
    """Every way to the bytes of a file, or to what pins it."""
    return {
        "stat": lambda: source.stat(name),
        "read": lambda: source.read(name, max_bytes=1 << 20),
        "read_head": lambda: source.read_head(name, 4),
        "read_ranges": lambda: source.read_ranges(name, [(0, 1)], [memoryview(bytearray(1))]),
        "map_range": lambda: source.map_range(name, 0, 1),
    }


WAYS = sorted(reads(LocalSource("/"), ""))


class TestRefused:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["absolute", "relative", "link to a link", "below a linked folder", "up and over"])
    def test_links_out_of_the_folder(self, model: Path, secret: Path, kind: str, way: str) -> None:
        name = "tokenizer.json"
        match kind:
            case "absolute":
                link(model / name, secret)
            case "relative":
                link(model / name, "../etc/shadow")
            case "link to a link":
                link(model / "inner", secret)
                link(model / name, "inner")
            case "below a linked folder":
                link(model / "sub", secret.parent)
                name = "sub/shadow"
            case _:
                link(model / name, f"../{model.name}/../etc/shadow")
        with pytest.raises(CheckpointError) as caught:
            reads(LocalSource(model), name)[way]()
        assert caught.value.where == str(model / name)
        assert str(secret) in caught.value.what
        assert "copy the file here" in str(caught.value.remedy)

    def test_a_folder_whose_name_begins_alike_is_another(self, model: Path, tmp_path: Path) -> None:
        other = tmp_path / "model-2" / "x"
        other.parent.mkdir()
        other.write_text("x")
        link(model / "tokenizer.json", other)
        with pytest.raises(CheckpointError, match="outside of the model's folder"):
            LocalSource(model).read("tokenizer.json", max_bytes=9)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "LICENSE"])
    def test_a_merge_ends_before_it_begins(self, model: Path, secret: Path, tmp_path: Path, name: str) -> None:
        link(model / name, secret)
        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
        with pytest.raises(CheckpointError, match="outside of the model's folder") as caught:
            mergekit_ray.merge(recipe, tmp_path / "out", options=MergeOptions(executor="local"))
        assert caught.value.where == str(model / name)
        assert not (tmp_path / "out").exists()

    def test_a_file_that_becomes_a_link_while_it_is_read(self, model: Path, secret: Path) -> None:
        source = LocalSource(model)
        source.read("tokenizer.json", max_bytes=9)
        link(model / "tokenizer.json", secret)
        with pytest.raises(CheckpointError, match="outside of the model's folder"):
            source.read("tokenizer.json", max_bytes=99)

    def test_what_is_not_needed_is_in_nobodys_way(self, model: Path, secret: Path) -> None:
        link(model / "notes", secret)
        link(model / "runs", secret.parent)
        link(model / "gone.txt", "nowhere")
        opened = open_checkpoint(LocalSource(model), "m")
        assert [file.name for file in opened.side_files] == ["tokenizer.json"]

    def test_a_folder_of_links_made_on_purpose(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = tmp_path / "made"
        for file in model.iterdir():
            link(made / file.name, file)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(LocalSource(made), "m")
        assert LINKS_VARIABLE in str(caught.value.remedy)
        monkeypatch.setenv(LINKS_VARIABLE, f"/somewhere{os.pathsep}{model}")
        assert open_checkpoint(LocalSource(made), "m").tensors
        for useless in ("", ".", "model", str(tmp_path / "mod")):
            monkeypatch.setenv(LINKS_VARIABLE, useless)
            with pytest.raises(CheckpointError):
                open_checkpoint(LocalSource(made), "m")

    def test_hard_links_are_files(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        for file in model.iterdir():
            (tmp_path / "made" / file.name).hardlink_to(file)
        assert open_checkpoint(LocalSource(tmp_path / "made"), "m").tensors


class TestFollowed:
    def test_links_that_stay_inside(self, model: Path) -> None:
        (model / "sub").mkdir()
        (model / "sub" / "real").write_text("{1}")
        link(model / "inner", "sub/real")
        link(model / "tokenizer.json", model / "inner")
        assert LocalSource(model).read("tokenizer.json", max_bytes=9) == b"{1}"

    def test_a_model_that_is_a_link(self, model: Path, tmp_path: Path) -> None:
        link(model / "vocab.json", model / "tokenizer.json")
        place = link(tmp_path / "far" / "a", link(tmp_path / "b", model))
        opened = open_checkpoint(LocalSource(place), "m")
        assert [file.name for file in opened.side_files] == ["tokenizer.json", "vocab.json"]
        assert LocalSource(place).read("vocab.json", max_bytes=9) == b"{}"


class TestHubCache:
    """``models--org--name`` with ``blobs`` and ``snapshots``."""

    @pytest.fixture
    def cached(self, tmp_path: Path) -> Path:
        repository = tmp_path / "hub" / "models--org--name"
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / BLOB).write_text("blob")
        return repository

    @pytest.mark.parametrize("commit", ["c0ffee", "c0ffee2"])  # blobs are shared by commits
    @pytest.mark.parametrize("by", ["itself", "a link"])
    def test_blobs_of_the_same_repository(self, cached: Path, tmp_path: Path, commit: str, by: str) -> None:
        snapshot = cached / "snapshots" / commit
        link(snapshot / "vocab.json", f"../../blobs/{BLOB}")
        link(snapshot / "onnx" / "vocab.json", f"../../../blobs/{BLOB}")
        place = snapshot if by == "itself" else link(tmp_path / "mine", snapshot)
        assert LocalSource(place).read("vocab.json", max_bytes=9) == b"blob"
        assert LocalSource(place).read("onnx/vocab.json", max_bytes=9) == b"blob"
        assert LocalSource(place / "onnx").read("vocab.json", max_bytes=9) == b"blob"

    @pytest.mark.parametrize("what", ["the folder", "the blob"])
    def test_blobs_that_lie_in_a_shared_store(self, cached: Path, tmp_path: Path, what: str) -> None:
        link(cached / "snapshots" / "c0ffee" / "vocab.json", f"../../blobs/{BLOB}")
        if what == "the folder":
            (cached / "blobs").rename(tmp_path / "store")
            link(cached / "blobs", tmp_path / "store")
        else:
            (tmp_path / "store").mkdir()
            (cached / "blobs" / BLOB).rename(tmp_path / "store" / BLOB)
            link(cached / "blobs" / BLOB, tmp_path / "store" / BLOB)
        assert LocalSource(cached / "snapshots" / "c0ffee").read("vocab.json", max_bytes=9) == b"blob"

    @pytest.mark.parametrize("how", ["past the blobs", "by a linked folder", "by a linked blob", "another's files"])
    def test_the_layout_is_no_way_out(self, cached: Path, secret: Path, how: str) -> None:
        file = cached / "snapshots" / "c0ffee" / "vocab.json"
        match how:
            case "past the blobs":
                link(file, secret)
            case "by a linked folder":
                (cached / "blobs" / BLOB).unlink()
                (cached / "blobs").rmdir()
                link(cached / "blobs", secret.parent)
                link(file, "../../blobs/shadow")
            case "by a linked blob":
                link(cached / "blobs" / BLOB, secret)
                link(file, f"../../blobs/{BLOB}")
            case _:
                (cached.parent / "other").mkdir()
                (cached.parent / "other" / "token").write_text("hf_sesame")
                link(file, "../../../other/token")
        with pytest.raises(CheckpointError, match="outside of the model's folder"):
            LocalSource(file.parent).read(file.name, max_bytes=99)


class TestNowhere:
    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    @pytest.mark.parametrize("target", ["/gone/file", "itself"])
    def test_a_link_that_leads_nowhere(self, model: Path, name: str, target: str) -> None:
        link(model / name, name if target == "itself" else target)
        with pytest.raises(CheckpointError, match="which is not there") as caught:
            open_checkpoint(LocalSource(model), "m")
        assert caught.value.where == str(model / name)
        assert str(caught.value.what).startswith(f"a link to {name if target == 'itself' else target}")
        source = LocalSource(model)
        assert source.stat(name) is None
        assert name not in [file.name for file in source.list()]
        with pytest.raises(CheckpointError, match="which is not there"):
            source.read(name, max_bytes=9)

    def test_a_pipe_in_the_place_of_a_file(self, model: Path) -> None:
        (model / "tokenizer.json").unlink()
        os.mkfifo(model / "tokenizer.json")
        with pytest.raises(CheckpointError, match="neither a file nor a folder") as caught:
            open_checkpoint(LocalSource(model), "m")
        assert caught.value.where == str(model / "tokenizer.json")

    def test_one_of_the_files_that_an_index_names(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "a.safetensors")
        tensors = open_checkpoint(LocalSource(model), "m").tensors
        weight_map = dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        link(model / "unused.safetensors", "gone")
        with pytest.raises(CheckpointError, match="1 weight file of 2 missing"):
            open_checkpoint(LocalSource(model), "m")
        link(model / "b.safetensors", "gone")
        with pytest.raises(CheckpointError, match="a link to gone, which is not there"):
            open_checkpoint(LocalSource(model), "m")

    def test_a_linked_folder_is_not_left_out_in_silence(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates" / "tools.jinja").write_text("x")
        link(model / "additional_chat_templates", tmp_path / "templates")
        with pytest.raises(CheckpointError, match="a link to a folder") as caught:
            open_checkpoint(LocalSource(model), "m")
        assert str(tmp_path / "templates") in str(caught.value)
        assert "copy the folder here" in str(caught.value)


def test_adapters_too(tmp_path: Path, secret: Path) -> None:
    from mergekit_ray.checkpoint.adapter import open_adapter

    for name, target in (("adapter_config.json", str(secret)), ("adapter_model.safetensors", "gone")):
        folder = tmp_path / name
        link(folder / name, target)
        (folder / "x").write_text("x")
        with pytest.raises(CheckpointError, match="a link to"):
            open_adapter(LocalSource(folder), "a")


def writes(store: LocalStore, name: str) -> dict[str, Callable[[], Any]]:
    """Every way to change a file."""
    return {
        "open": lambda: store.open(name, 1),
        "put": lambda: store.put(name, b"x"),
        "put_if_absent": lambda: store.put_if_absent(name, b"x"),
        "replace": lambda: store.replace(name, b"x", version=""),
        "move to it": lambda: store.move({"there": name}),
        "move away": lambda: store.move({name: "there"}),
        "delete": lambda: store.delete([name]),
        "discard": lambda: store.discard_remains([name]),
    }


class TestOutputs:
    """Links below an output: nothing is written through them."""

    @pytest.mark.parametrize("way", sorted(writes(LocalStore("/"), "")))
    @pytest.mark.parametrize("root", ["", ".mergekit-ray/digest/staged"])
    def test_a_link_in_the_place_of_a_folder(self, tmp_path: Path, secret: Path, root: str, way: str) -> None:
        out = tmp_path / "out"
        made = link(out / root if root else out / "sub", secret.parent)
        (secret.parent / "there").write_text("x")
        temporary = secret.parent / f".shadow.{16 * '0'}.tmp"
        temporary.write_text("")
        with pytest.raises(PlanError, match="nothing is written through a link") as caught:
            writes(LocalStore(out / root), "shadow" if root else "sub/shadow")[way]()
        assert caught.value.where == str(made)
        assert str(secret.parent) in caught.value.what
        assert "remove the link" in str(caught.value.remedy)
        assert {file.name for file in secret.parent.iterdir()} == {"shadow", "there", temporary.name}
        assert secret.read_text() == "root:sesame"

    @pytest.mark.parametrize("target", ["elsewhere", "gone"])
    @pytest.mark.parametrize("name", [".mergekit-ray", ".mergekit-ray/lease.json"])
    def test_a_merge_ends_before_it_begins(self, model: Path, tmp_path: Path, name: str, target: str) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "lease.json").write_text("{}")
        (elsewhere / "records").write_text("{}")
        out = tmp_path / "out"
        made = link(out / name, tmp_path / target / ("records" if name.endswith(".json") else ""))
        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
        with pytest.raises(PlanError, match="nothing is written through a link") as caught:
            mergekit_ray.merge(recipe, out, options=MergeOptions(executor="local"))
        assert caught.value.where == str(made)
        assert [file.read_text() for file in elsewhere.iterdir()] == ["{}", "{}"]
        assert not (tmp_path / "gone").exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_links_in_the_place_of_files_are_replaced(self, model: Path, tmp_path: Path, overwrite: bool) -> None:
        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
        options = MergeOptions(executor="local", overwrite=overwrite)
        mergekit_ray.merge(recipe, tmp_path / "wanted", options=options)
        names = [file.name for file in (tmp_path / "wanted").iterdir()]
        targets = {name: tmp_path / "elsewhere" / name for name in names}
        (tmp_path / "elsewhere").mkdir()
        for name, target in targets.items():
            link(tmp_path / "out" / name, target)
            if overwrite:
                target.write_text("mine")
        mergekit_ray.merge(recipe, tmp_path / "out", options=options)
        assert {name: target.read_text() for name, target in targets.items() if target.exists()} == (
            dict.fromkeys(names, "mine") if overwrite else {}
        )
        for name in names:
            assert not (tmp_path / "out" / name).is_symlink()
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


class TestFolders:
    """Links on the way to a folder that is opened."""

    @pytest.mark.parametrize("open_place", [open_source, open_sink])
    @pytest.mark.parametrize("name", ["out", "out/deep/er", "file", "loop"])
    def test_one_that_leads_nowhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_place: Callable[[str], Any], name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        target = "loop" if name == "loop" else "/nowhere/at all"
        made = link(tmp_path / ("loop" if name == "loop" else "out"), target)
        place = (tmp_path / "out").as_uri() if name == "file" else name  # "out/deep" is a name of the Hub's as well
        with pytest.raises(StorageError) as caught:
            open_place(place)
        assert caught.value.what == f"{made} is a link to {target}, which is not there, or may not be read"
        assert "mount or make the folder" in str(caught.value.remedy)
        assert not caught.value.retryable
        assert list(tmp_path.iterdir()) == [made]

    def test_one_that_leads_to_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        sink = open_sink(str(link(tmp_path / "out", tmp_path / "real") / "new"))
        sink.put("x", b"1")
        assert (tmp_path / "real" / "new" / "x").read_bytes() == b"1"

    def test_a_merge_there_ends_before_it_begins(self, model: Path, tmp_path: Path) -> None:
        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
        with pytest.raises(StorageError, match="is a link to /nowhere, which is not there"):
            mergekit_ray.merge(recipe, link(tmp_path / "out", "/nowhere"), options=MergeOptions(executor="local"))
        assert not Path("/nowhere").exists()
