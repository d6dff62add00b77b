"""Models of diffusers: their file names, and what is said of a whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.diffusers import is_of_diffusers, pipeline_error
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.plan import index_name
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.local.store import LocalStore

CONFIG = b'{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}'
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def put(store: LocalStore, name: str, *tensors: str) -> None:
    specs = [TensorSpec(tensor, DType.F32, (2,)) for tensor in tensors]
    store.put(name, encode_header(specs) + bytes(8 * len(specs)))


def opened(folder: Path, files: dict[str, Any], index: bytes | None = None) -> Checkpoint:
    store = LocalStore(folder)
    store.put("config.json", CONFIG)
    for name, tensors in files.items():
        put(store, name, *tensors)
    if index is not None:
        store.put(INDEX, index)
    return open_checkpoint(store, "./unet")


def test_the_file_without_a_variant_is_read(tmp_path: Path) -> None:
    found = opened(tmp_path, {f"{STEM}.safetensors": "ab", f"{STEM}.fp16.safetensors": "ab", "model.safetensors": "c"})
    assert (set(found.tensors), set(found.files)) == ({"a", "b"}, {f"{STEM}.safetensors"})


def test_a_variant_alone_is_read(tmp_path: Path) -> None:
    assert set(opened(tmp_path, {f"{STEM}.fp16.safetensors": "ab"}).tensors) == {"a", "b"}


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    files = {f"{STEM}-0000{i}-of-00002.safetensors": name for i, name in ((1, "a"), (2, "b"))}
    index = json.dumps({"weight_map": dict(zip("ab", files, strict=True))}).encode()
    assert set(opened(tmp_path, {**files, "old.safetensors": "a"}, index).files) == set(files)


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1 weight file of 1 missing: x\.safetensors"):
        opened(tmp_path, {}, b'{"weight_map": {"a": "x.safetensors"}}')


def test_a_pipeline_names_its_models(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        store.put(name, b"{}")
    for name in ("unet/x.safetensors", "vae/x.safetensors", "loras/x.safetensors", "x.safetensors"):
        put(store, name, "a")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(store, "./pipe")
    assert "a diffusers pipeline, which holds 2 models" in caught.value.what
    assert str(caught.value.remedy).endswith(": ./pipe/unet, ./pipe/vae")


def test_a_pipeline_on_the_hub_is_to_be_downloaded() -> None:
    names = ["model_index.json", "unet/config.json", "unet/a.safetensors"]
    error = pipeline_error(names, "org/pipe", is_folder=False)
    assert error is not None
    assert str(error.remedy).startswith("download it")
    assert str(error.remedy).endswith(": unet")


@pytest.mark.parametrize("names", [["config.json", "model_index.json"], ["unet/config.json"]])
def test_what_is_no_pipeline(names: list[str]) -> None:
    assert pipeline_error(names, "x", is_folder=True) is None


def test_a_pipeline_without_weights_that_can_be_read() -> None:
    error = pipeline_error(["model_index.json", "unet/config.json", "unet/a.bin"], "x", is_folder=True)
    assert error is not None
    assert "no folder in it holds both" in error.what


def test_configs() -> None:
    assert is_of_diffusers({"_class_name": "X", "_diffusers_version": "1"})
    assert not is_of_diffusers({"model_type": "clip"})


@pytest.mark.parametrize(
    ("file", "index"),
    [
        (f"{STEM}-00001-of-00001.safetensors", INDEX),
        ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        ("unet-00001-of-00001.safetensors", "unet.safetensors.index.json"),
        ("unet.safetensors", "unet.safetensors.index.json"),
    ],
)
def test_indexes(file: str, index: str) -> None:
    assert index_name(file) == index
