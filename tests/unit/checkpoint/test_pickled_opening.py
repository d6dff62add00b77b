"""Folders whose weights are pickled: which files are read, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.opening import open_source

A, B = {"a": torch.zeros(2)}, {"b": torch.ones(2, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def files_of(folder: Path, **options: Any) -> list[str]:
    return sorted(opened(folder, **options).files)


def opened(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(LocalStore(folder), "org/model", **options)


def write_index(folder: Path, name: str, weight_map: dict[str, str]) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_and_what_a_trainer_left(folder: Path) -> None:
    torch.save({**A, **B}, folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"not read")
    checkpoint = opened(folder)
    assert sorted(checkpoint.files) == ["pytorch_model.bin"]
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.warnings == []


def test_several_files_with_an_index_and_without(folder: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, tensors in zip(names, (A, B), strict=True):
        torch.save(tensors, folder / name)
    assert files_of(folder) == names
    write_index(folder, "pytorch_model.bin.index.json", {"a": names[0], "b": names[1]})
    assert files_of(folder) == names
    write_index(folder, "pytorch_model.bin.index.json", {"a": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"which is not a \.bin file"):
        opened(folder)


def test_a_series_must_be_complete(folder: Path) -> None:
    torch.save(A, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"of the 2 files pytorch_model-\*-of-00002.bin only 1 are there"):
        opened(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_safetensors_come_first(name: str, folder: Path) -> None:
    torch.save(B, folder / "pytorch_model.bin")
    save_file(A, folder / name)
    assert files_of(folder) == [name]


def test_another_name_is_read_if_it_can_be_nothing_else(folder: Path) -> None:
    torch.save(A, folder / "weights.pt")
    assert files_of(folder) == ["weights.pt"]
    (folder / "config.json").unlink()
    assert files_of(folder, allow_raw=True) == ["weights.pt"]
    torch.save(B, folder / "ema.pt")
    with pytest.raises(CheckpointError, match=r"several that torch.save may have written: ema.pt, weights.pt"):
        opened(folder, allow_raw=True)


def test_what_else_a_file_holds_is_told(folder: Path) -> None:
    torch.save({"state_dict": A, "epoch": 3}, folder / "pytorch_model.bin")
    checkpoint = opened(folder)
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.warnings == ["pytorch_model.bin of org/model holds more than the model: 'epoch' is not read"]


@pytest.mark.parametrize("name", ["unet.pt", "unet.safetensors"])
def test_a_damaged_file_is_named_once(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK" + bytes(100))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(open_source(str(tmp_path / name)), "org/model", allow_raw=True)
    assert caught.value.where == str(tmp_path / name)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="there are no safetensors files"):
        opened(folder)
