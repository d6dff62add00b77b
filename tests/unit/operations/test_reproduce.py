"""Doing a merge again from its manifest; the manifest against its published schema."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped] # its stubs are a package of their own
import pytest
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray.cli import app
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import Reproduction, reproduce
from mergekit_ray.operations.verify import verify
from mergekit_ray.output.destination import MANIFEST_FILE
from mergekit_ray.output.manifest import read_manifest
from support.manifests import edit_manifest, make_old
from support.models import contents

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "manifest.schema.json").read_text())
LOCAL = MergeOptions(executor="local")


def recipe(models: list[Path], method: str = "dare_ties", **more: Any) -> dict[str, Any]:
    """With random masks, several shards, and a seed of its own."""
    base, tuned = models
    listed = [{"model": str(tuned), "parameters": {"weight": 0.5, "density": 0.5}}]
    made = {"merge_method": method, "base_model": str(base), "models": listed, "seed": 11}
    return {**made, "output": {"max_shard_size": 400}, **more}


@pytest.fixture
def out(models: list[Path], tmp_path: Path) -> Path:
    """A published model."""
    mergekit_ray.merge(recipe(models), tmp_path / "out", options=LOCAL)
    return tmp_path / "out"


def again(place: Path, target: Path) -> Reproduction:
    return reproduce(read_manifest(str(place)), str(target), LOCAL)


class TestReproduce:
    @pytest.mark.parametrize("name", ["", MANIFEST_FILE])
    def test_every_file_comes_out_the_same(self, out: Path, tmp_path: Path, name: str) -> None:
        found = again(out / name, tmp_path / "again")
        assert (found.problems, found.notes) == ((), ())
        assert found.num_shards == len(list(out.glob("*.safetensors"))) > 2
        assert contents(tmp_path / "again") == contents(out)

    def test_a_model_named_by_a_relative_path_is_found_where_it_was(
        self, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(models[0].parent)
        near = [Path(f"./{path.name}") for path in models]
        made = recipe(models)
        made["base_model"], made["models"][0]["model"] = (f"./{path.name}" for path in near)
        mergekit_ray.merge(made, tmp_path / "out", options=LOCAL)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert again(tmp_path / "out", tmp_path / "again").problems == ()
        assert contents(tmp_path / "again") == contents(tmp_path / "out")

    def test_a_shard_that_came_out_another_is_named(self, out: Path, tmp_path: Path) -> None:
        def change(data: dict[str, Any]) -> None:
            tensors = data["shards"][1]["tensors_xxh3_128"]
            tensors[next(iter(tensors))] = "0" * 32
            data["shards"][2]["sha256"] = "0" * 64

        edit_manifest(out, change)
        first, second = again(out, tmp_path / "again").problems
        assert "tensor " in first
        assert "XXH3-128" in first
        assert "SHA-256" in second

    def test_a_copy_with_another_time_is_as_good(self, out: Path, models: list[Path], tmp_path: Path) -> None:
        os.utime(models[1] / "model.safetensors", ns=(1, 1))
        found = again(out, tmp_path / "again")
        assert found.problems == ()
        [note] = found.notes
        assert f"{models[1]}/model.safetensors: another version" in note

    def test_another_input_is_refused_before_anything_is_written(
        self, out: Path, models: list[Path], tmp_path: Path
    ) -> None:
        path = models[1] / "model.safetensors"
        data = path.read_bytes()
        # As long as the original, and as whole.
        path.write_bytes(data.replace(b"layers.0.input_layernorm", b"layers.0.other_layernorm"))
        with pytest.raises(CheckpointError):
            again(out, tmp_path / "again")
        path.write_bytes(data)
        edit_manifest(
            out, lambda found: found["inputs"][str(models[1])]["files"]["model.safetensors"].update(num_bytes=1)
        )
        with pytest.raises(CheckpointError, match="its size or header differs"):
            again(out, tmp_path / "again")
        edit_manifest(out, lambda found: found["inputs"][str(models[1])]["files"].clear())
        with pytest.raises(CheckpointError, match="was not read when the model was made"):
            again(out, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_a_header_that_changed_is_noticed(self, out: Path, models: list[Path], tmp_path: Path) -> None:
        path = models[1] / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        # The same tensors in the same places, written otherwise.
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        path.write_bytes(data[:8] + text + data[8 + length :])
        with pytest.raises(CheckpointError, match="its size or header differs"):
            again(out, tmp_path / "again")

    def test_other_tensors_than_listed_are_told(self, out: Path, tmp_path: Path) -> None:
        edit_manifest(out, lambda found: found["shards"].pop())
        with pytest.raises(CheckpointError, match="makes other tensors than the manifest lists, first "):
            again(out, tmp_path / "again")

    def test_other_software_is_noted(self, out: Path, tmp_path: Path) -> None:
        edit_manifest(out, lambda found: found["software"].update(torch="0.1"))
        [note] = again(out, tmp_path / "again").notes
        assert note.startswith("made with torch 0.1, reproduced with ")

    def test_a_manifest_that_is_a_link(self, out: Path, tmp_path: Path) -> None:
        (tmp_path / "link.json").symlink_to(out / MANIFEST_FILE)
        assert again(tmp_path / "link.json", tmp_path / "again").problems == ()

    def test_an_edited_manifest_is_noted(self, out: Path, tmp_path: Path) -> None:
        path = out / MANIFEST_FILE
        path.write_text(path.read_text().replace('"seed": 11', '"seed": 12', 1))
        found = again(out, tmp_path / "again")
        assert f"{MANIFEST_FILE} was changed after it was written (its own digest differs)" in found.notes
        assert found.problems

    @pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
    def test_another_file_beside_the_weights_is_named(self, out: Path, tmp_path: Path, name: str) -> None:
        edit_manifest(out, lambda found: found["files"][name].update(sha256="0" * 64))
        assert again(out, tmp_path / "again").problems == (f"{name}: came out different (SHA-256 differs)",)

    def test_a_side_file_that_is_gone_or_new_is_named(self, out: Path, models: list[Path], tmp_path: Path) -> None:
        (models[0] / "tokenizer.json").unlink()
        (models[0] / "vocab.json").write_text("{}")
        assert again(out, tmp_path / "again").problems == (
            "tokenizer.json: was not made",
            "vocab.json: came out different (SHA-256 differs)",
        )

    def test_the_card_names_the_software_and_is_not_compared(self, out: Path, tmp_path: Path) -> None:
        edit_manifest(out, lambda found: found["files"]["README.md"].update(sha256="0" * 64))
        assert again(out, tmp_path / "again").problems == ()

    def test_a_manifest_of_an_earlier_version(self, out: Path, tmp_path: Path) -> None:
        make_old(out)
        found = again(out, tmp_path / "again")
        assert found.problems == ()
        assert found.notes == (
            "the manifest is of an earlier version: it lists no files beside the weights to compare",
        )

    @pytest.mark.parametrize(
        "damage", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "recipe": 3}', "[" * 100_000]
    )
    def test_what_is_no_manifest(self, tmp_path: Path, damage: str) -> None:
        (tmp_path / MANIFEST_FILE).write_text(damage)
        with pytest.raises(CheckpointError, match=r"manifest|not JSON"):
            read_manifest(str(tmp_path / MANIFEST_FILE))

    def test_a_folder_without_a_manifest_is_told_as_verify_tells_it(self, tmp_path: Path) -> None:
        errors = []
        for read in (read_manifest, verify):
            with pytest.raises(CheckpointError, match=f"no {MANIFEST_FILE}: this is not a published model") as caught:
                read(str(tmp_path))
            errors.append(str(caught.value))
        assert errors[0] == errors[1]

    @pytest.mark.parametrize("key", ["shards", "inputs", "files"])
    def test_a_manifest_that_was_changed(self, out: Path, tmp_path: Path, key: str) -> None:
        def change(data: dict[str, Any]) -> None:
            if key == "shards":
                data["shards"][0] = {"file": "x"}
            elif key == "files":
                data["files"] = ["x"]
            else:
                next(iter(data["inputs"].values())).pop("uri")

        edit_manifest(out, change)
        with pytest.raises(CheckpointError, match="the manifest was changed"):
            again(out, tmp_path / "again")

    def test_the_command(self, out: Path, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["reproduce", str(out), str(tmp_path / "again"), "--json"])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["ok"] is True
        said = CliRunner().invoke(app, ["reproduce", str(out / MANIFEST_FILE), str(tmp_path / "third")])
        assert "all as the manifest says" in said.stdout
        edit_manifest(out, lambda found: found["shards"][0].update(sha256="0" * 64))
        done = CliRunner().invoke(app, ["reproduce", str(out), str(tmp_path / "again"), "--quiet"])
        assert done.exit_code == 2, "it is there already"
        done = CliRunner().invoke(app, ["reproduce", str(out), str(tmp_path / "fourth"), "--quiet"])
        assert done.exit_code == 3
        assert done.stderr.startswith("wrong: model-00001")


class TestSchema:
    def test_is_one(self) -> None:
        jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def test_manifests_follow_it(self, out: Path, models: list[Path], tmp_path: Path) -> None:
        jsonschema.validate(read_manifest(str(out)), SCHEMA)
        shutil.copytree(models[0], tmp_path / "with-files")
        (tmp_path / "with-files" / "LICENSE").write_text("of the model")
        passed = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "with-files")}]}
        mergekit_ray.merge(passed, tmp_path / "passed", options=LOCAL)
        found = read_manifest(str(tmp_path / "passed"))
        assert "LICENSE" in found["side_files"]
        jsonschema.validate(found, SCHEMA)

    def test_so_do_those_of_earlier_versions(self, out: Path) -> None:
        make_old(out)
        jsonschema.validate(read_manifest(str(out)), SCHEMA)

    @pytest.mark.parametrize(
        "change",
        [
            lambda found: found.pop("seed"),
            lambda found: found.update(format=2),
            lambda found: found.update(password="x"),
            lambda found: found.update(plan_digest="abc"),
            lambda found: found["shards"][0].update(file="../model.safetensors"),
            lambda found: found["shards"][0].update(file="/etc/model.safetensors"),
            lambda found: found["shards"][0].pop("sha256"),
            lambda found: found.update(shards=[]),
            lambda found: next(iter(found["inputs"].values())).update(token="x"),
            lambda found: found["software"].pop("torch"),
            lambda found: found["files"].pop("config.json"),
            lambda found: found["files"]["config.json"].update(sha256="x"),
            lambda found: found["files"].update({"../config.json": found["files"]["config.json"]}),
            lambda found: found.pop("files"),
            lambda found: found.pop("manifest_sha256"),
        ],
    )
    def test_what_does_not_follow_it_is_refused(self, out: Path, change: Callable[[dict[str, Any]], object]) -> None:
        data = read_manifest(str(out))
        change(data)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, SCHEMA)


def test_another_device_is_noted(out: Path, tmp_path: Path) -> None:
    """Sums may be rounded differently there: whoever sees digests that differ should know."""

    def was_made_on_a_gpu(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            assert shard["device"] == "cpu"
            shard["device"] = "cuda"

    edit_manifest(out, was_made_on_a_gpu)
    jsonschema.validate(json.loads((out / MANIFEST_FILE).read_text()), SCHEMA)
    found = again(out, tmp_path / "again")
    assert found.problems == ()
    assert "made on cuda, reproduced on cpu: choose the same device" in found.notes
