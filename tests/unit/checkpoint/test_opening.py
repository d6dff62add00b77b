from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint import weight_files
from mergekit_ray.checkpoint.index import parse_index
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.checkpoint.side_files import is_side_file
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.local.store import LocalStore

INDEX = "model.safetensors.index.json"


class Folder:
    """Writes a checkpoint's files."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        self.write("config.json", {"model_type": "llama"})

    def write(self, name: str, content: object) -> None:
        self.store.put(name, json.dumps(content).encode())

    def weights(self, name: str, *tensors: str) -> None:
        specs = [TensorSpec(tensor, DType.F32, (2,)) for tensor in tensors]
        self.store.put(name, encode_header(specs) + bytes(8 * len(specs)))

    def index(self, weight_map: Any) -> None:
        self.write(INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})

    def open(self) -> Checkpoint:
        return open_checkpoint(self.store, "org/model")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_single_file(folder: Folder) -> None:
    folder.weights("model.safetensors", "a", "b")
    checkpoint = folder.open()
    assert checkpoint.reference == "org/model"
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.files == {"model.safetensors": folder.store.stat("model.safetensors")}
    size = checkpoint.files["model.safetensors"].num_bytes
    assert checkpoint.tensors == {
        "a": (TensorSpec("a", DType.F32, (2,)), Location("model.safetensors", size - 16, size - 8)),
        "b": (TensorSpec("b", DType.F32, (2,)), Location("model.safetensors", size - 8, size)),
    }
    assert checkpoint.unindexed == []
    assert checkpoint.warnings == []


def test_an_index_says_what_is_read(folder: Folder) -> None:
    folder.weights("model-1.safetensors", "a", "b", "left over")
    folder.weights("model-2.safetensors", "c", "a")
    folder.weights("stale.safetensors", "d")
    folder.index({"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    checkpoint = folder.open()
    assert {name: location.file for name, (_, location) in checkpoint.tensors.items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    assert sorted(checkpoint.files) == ["model-1.safetensors", "model-2.safetensors"]
    assert checkpoint.unindexed == ["left over", "a (a copy in model-2.safetensors)"]


def test_files_without_an_index(folder: Folder) -> None:
    folder.weights("model-00001-of-00002.safetensors", "a")
    folder.weights("model-00002-of-00002.safetensors", "b")
    folder.weights("checkpoint-500/model.safetensors", "a")
    assert sorted(folder.open().tensors) == ["a", "b"]
    folder.store.delete(["model-00001-of-00002.safetensors"])
    with pytest.raises(CheckpointError, match=r"of the 2 files model-\*-of-00002.safetensors only 1 are there"):
        folder.open()


def test_files_that_contradict_each_other(folder: Folder) -> None:
    folder.weights("one.safetensors", "a")
    folder.weights("two.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"'a' is both in one\.safetensors and in two\.safetensors"):
        folder.open()


def test_a_single_file_beside_an_index_is_what_transformers_reads(folder: Folder) -> None:
    folder.weights("model.safetensors", "a")
    folder.weights("model-00001-of-00001.safetensors", "a", "b")
    folder.index({"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"})
    checkpoint = folder.open()
    assert list(checkpoint.tensors) == ["a"]
    [warning] = checkpoint.warnings
    assert "holds both model.safetensors and model.safetensors.index.json" in warning
    folder.index({"a": "model.safetensors"})
    assert folder.open().warnings == []


def test_missing_files_are_named(folder: Folder) -> None:
    folder.weights("0.safetensors", "t0")
    folder.index({f"t{i}": f"{i}.safetensors" for i in range(9)})
    with pytest.raises(CheckpointError, match=r"8 weight files of 9 missing: 1.safetensors, .* and 3 more"):
        folder.open()


def test_tensors_that_no_file_has_are_named(folder: Folder) -> None:
    folder.weights("0.safetensors", "a")
    folder.weights("1.safetensors", "b")
    folder.index({"a": "0.safetensors", "b": "0.safetensors", "c": "1.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"the index names files that lack 2 tensors: b in 0.safetensors, c in 1.safetensors"
    ):
        folder.open()


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/../../model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "s3://bucket/model.safetensors",
        "./model.safetensors",
        "a//model.safetensors",
        "",
    ],
)
def test_an_index_cannot_point_elsewhere(folder: Folder, file: str) -> None:
    folder.index({"a": file})
    with pytest.raises(CheckpointError, match="which is not a file of this checkpoint"):
        folder.open()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map":["a"]}', "no weight_map"),
        (b'{"weight_map":{"a":1}}', "no weight_map"),
        (b'{"weight_map":{}}', "weight_map is empty"),
        (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map":{"a":"pytorch_model.bin"}}', "not a .safetensors file"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_malformed_index(index: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_index(index, "index")


def test_what_is_not_a_model(tmp_path: Path, folder: Folder) -> None:
    with pytest.raises(ModelError, match="there are no files"):
        open_checkpoint(LocalStore(tmp_path / "nothing"), "org/model")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        folder.open()
    folder.store.delete(["config.json"])
    folder.write("confg.json", {})
    with pytest.raises(ModelError, match=r"no config.json; did you mean 'confg.json'"):
        folder.open()
    folder.write("adapter_config.json", {})
    with pytest.raises(ModelError, match="a LoRA adapter, not a model"):
        folder.open()


def test_a_config_is_an_object_of_bounded_size(folder: Folder) -> None:
    folder.weights("model.safetensors", "a")
    folder.write("config.json", [])
    with pytest.raises(CheckpointError, match="config is not a JSON object"):
        folder.open()
    folder.store.put("config.json", b" " * ((16 << 20) + 1))
    with pytest.raises(CheckpointError, match="more than"):
        folder.open()


def test_many_files(folder: Folder) -> None:
    for number in range(60):
        folder.weights(f"{number}.safetensors", f"t{number}")
    folder.index({f"t{number}": f"{number}.safetensors" for number in range(60)})
    checkpoint = folder.open()
    assert {name: location.file for name, (_, location) in checkpoint.tensors.items()} == {
        f"t{number}": f"{number}.safetensors" for number in range(60)
    }


TRAVELS = """
    tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3 special_tokens_map.json
    added_tokens.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model tekken.json
    qwen.tiktoken generation_config.json preprocessor_config.json chat_template.jinja chat_template.json
    modeling_phi.py configuration_phi.py LICENSE LICENSE.txt LICENSE.md NOTICE Notice.txt USE_POLICY.md
    additional_chat_templates/tool_use.jinja
"""
STAYS = """
    config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin
    pytorch_model.bin.index.json model.safetensors.index.fp32.json optimizer.pt scheduler.pt rng_state.pth
    training_args.bin trainer_state.json README.md README.txt .gitattributes .git/config .cache/x.json model.gguf
    flax_model.msgpack tf_model.h5 onnx/model.onnx checkpoint-500/tokenizer.json all_results.json eval_results.json
    adapter_config.json adapter_model.safetensors mergekit_config.yml mergekit-ray.json requirements.txt log.txt
    additional_chat_templates/nested/x.jinja additional_chat_templates/x.bin original/tokenizer.model image.png
"""


def test_more_tensors_than_can_be_planned_are_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MAX_TENSORS", 3)
    for k in range(3):
        folder.weights(f"model-{k}.safetensors", f"a{k}")
    assert len(folder.open().tensors) == 3
    folder.weights("model-3.safetensors", "a3")
    with pytest.raises(CheckpointError, match="more than 3 tensors"):
        folder.open()


def test_what_travels_with_the_weights(folder: Folder) -> None:
    for name in TRAVELS.split():
        assert is_side_file(name), name
    for name in STAYS.split():
        assert not is_side_file(name), name
    folder.weights("model.safetensors", "a")
    folder.write("tokenizer.json", {})
    folder.write("README.md", "")
    assert folder.open().side_files == [folder.store.stat("tokenizer.json")]


@pytest.mark.parametrize("name", [b"modeling_\xe9.py", b"model\xff.safetensors"])
def test_a_name_that_is_not_unicode(folder: Folder, tmp_path: Path, name: bytes) -> None:
    """A plan could not say it."""
    folder.weights("model.safetensors", "a")
    (tmp_path / os.fsdecode(b"junk\xff.dat")).write_bytes(b"of no interest")
    folder.open()
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not a file name in valid Unicode") as caught:
        folder.open()
    str(caught.value).encode()


# -- config.json, as transformers reads it ----------------------------------------------------------------------------


def test_a_config_may_hold_infinities(folder: Folder) -> None:
    """As transformers 4 writes Mamba 2's `time_step_limit`, and as 5 does."""
    folder.weights("model.safetensors", "a")
    folder.store.put("config.json", b'{"limit": [0.0, Infinity, -Infinity], "part": {"x": NaN}}')
    checkpoint = folder.open()
    assert checkpoint.config["limit"] == [0.0, math.inf, -math.inf]
    assert math.isnan(checkpoint.config["part"]["x"])
    assert checkpoint.warnings == []
    tagged = {"limit": [0.0, {"__float__": "Infinity"}]}
    folder.write("config.json", tagged)
    assert folder.open().config == tagged


def test_a_key_that_a_config_has_twice_is_named(folder: Folder) -> None:
    folder.weights("model.safetensors", "a")
    folder.store.put("config.json", b'{"eps": 1, "part": {"x": 1, "x": 2, "x": 3}, "eps": 5, "x": 4}')
    checkpoint = folder.open()
    assert checkpoint.config == {"eps": 5, "part": {"x": 3}, "x": 4}
    assert checkpoint.warnings == [
        f"{folder.store.uri}/config.json: the key {key!r} occurs twice; its last value is read, as transformers does"
        for key in ("x", "eps")
    ]


# -- weights without an index -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("consolidated", [["consolidated.safetensors"], ["consolidated-00001-of-00001.safetensors"]])
def test_a_complete_series_beside_files_of_another_form(folder: Folder, consolidated: list[str]) -> None:
    """Mistral's own files hold the same weights under other names."""
    for name in consolidated:
        folder.weights(name, "layers.0.attention.wq.weight")
    folder.weights("model-00001-of-00002.safetensors", "a")
    folder.weights("model-00002-of-00002.safetensors", "b")
    checkpoint = folder.open()
    assert sorted(checkpoint.tensors) == ["a", "b"]
    [warning] = checkpoint.warnings
    assert warning == (
        "org/model has no model.safetensors.index.json; model-00001-of-00002.safetensors, "
        f"model-00002-of-00002.safetensors are read, and not {consolidated[0]}"
    )
    folder.store.delete(["model-00001-of-00002.safetensors"])
    with pytest.raises(CheckpointError, match="only 1 are there"):
        folder.open()


def test_a_series_is_the_whole_model(folder: Folder) -> None:
    folder.weights("model-00001-of-00001.safetensors", "a")
    folder.weights("ema.safetensors", "a", "b")
    assert list(folder.open().tensors) == ["a"]
    assert len(folder.open().warnings) == 1


def test_consolidated_files_alone_are_read(folder: Folder) -> None:
    folder.weights("consolidated.safetensors", "a")
    checkpoint = folder.open()
    assert (list(checkpoint.tensors), checkpoint.warnings) == (["a"], [])
    folder.weights("weights.safetensors", "b")
    assert list(folder.open().tensors) == ["b"]
