"""The folders that ``modules.json`` names: which files of them travel with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.local.store import LocalStore

TENSOR = TensorSpec("a", DType.F32, (2,))
WEIGHTS = encode_header([TENSOR]) + bytes(TENSOR.num_bytes)


def opened(folder: Path, modules: Any, *names: str) -> Checkpoint:
    """A model with ``modules.json`` and these files beside it."""
    store = LocalStore(folder)
    store.put("config.json", b"{}")
    store.put("model.safetensors", WEIGHTS)
    store.put("modules.json", modules if isinstance(modules, bytes) else json.dumps(modules).encode())
    for name in names:
        store.put(name, b"{}")
    return open_checkpoint(store, "org/model")


def folders(*paths: Any) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(paths)]


def copied(checkpoint: Checkpoint) -> set[str]:
    return {file.name for file in checkpoint.side_files} - {"modules.json"}


def test_what_modules_hold_is_copied(tmp_path: Path) -> None:
    wanted = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3/own/code.py"}
    left = {
        "2_Dense/README.md",
        "2_Dense/optimizer.pt",
        "4_Other/config.json",
        "onnx/config.json",
        "3/.git/config.json",
    }
    found = opened(tmp_path, folders("", "1_Pooling", "2_Dense/", "3"), *wanted, *left)
    assert copied(found) == wanted
    assert set(found.tensors) == {"a"}
    assert found.left_behind == []


def test_pickled_weights_of_modules_are_left_behind(tmp_path: Path) -> None:
    names = ["1_A/config.json", "1_A/pytorch_model.bin", "2_B/model.safetensors", "2_B/pytorch_model.bin"]
    found = opened(tmp_path, folders("", "1_A", "2_B"), *names)
    assert copied(found) == {"1_A/config.json", "2_B/model.safetensors"}
    assert found.left_behind == ["1_A/pytorch_model.bin"]


@pytest.mark.parametrize(
    "path", ["..", "../other", "/etc", ".", "", "a/../b", ".hidden", ".mergekit-ray", "a\\b", 3, None]
)
def test_names_that_are_no_folder_of_the_model_are_passed_over(path: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    found = opened(
        tmp_path / "model", folders(path), ".hidden/config.json", ".mergekit-ray/config.json", "b/config.json"
    )
    assert copied(found) == set()


@pytest.mark.parametrize(
    "modules", [b"\xff", b"{", b'"1_Pooling"', b'{"path": "1_Pooling"}', b'["1_Pooling", null]', b"[" * 9000]
)
def test_files_of_another_form_name_nothing(modules: bytes, tmp_path: Path) -> None:
    assert copied(opened(tmp_path, modules, "1_Pooling/config.json")) == set()


@pytest.mark.parametrize("is_folder", [True, False])
def test_links_out_of_the_model_are_refused(is_folder: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    model = tmp_path / "model"
    if is_folder:
        model.mkdir()
        (model / "1_Pooling").symlink_to(secret)
    else:
        (model / "1_Pooling").mkdir(parents=True)
        (model / "1_Pooling" / "config.json").symlink_to(secret / "config.json")
    with pytest.raises(CheckpointError, match="a link to"):
        opened(model, folders("", "1_Pooling"))
