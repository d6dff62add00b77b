"""Merges of what ``torch.save`` wrote: the same bytes as merges of the same weights in safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_ray
from mergekit_ray import MergeOptions
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from support.adapters import llama, make_adapter
from support.models import contents
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import byte_level, save_model

LOCAL = MergeOptions(executor="local", device="cpu")
TOLD = {"README.md", "mergekit-ray.json"}


def pickled(folder: Path, to: Path, *, num_files: int = 1) -> Path:
    """The same model, its weights as transformers used to save them."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(num_files):
        name = "pytorch_model.bin" if num_files == 1 else f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin"
        torch.save({each: tensors[each] for each in names[i::num_files]}, to / name)
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {
        name: save_model(root / name, byte_level(), seed, dtype=torch.bfloat16) for seed, name in enumerate("abc")
    }
    return models | {
        f"{name}.bin": pickled(models[name], root / f"{name}-bin", num_files=i) for i, name in enumerate("abc", 1)
    }


def recipe(places: dict[str, Any], ending: str = "", **rest: Any) -> dict[str, Any]:
    models = [{"model": str(places[name + ending]), "parameters": {"weight": 0.6}} for name in "bc"]
    return {"merge_method": "task_arithmetic", "base_model": str(places["a" + ending]), "models": models, **rest}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert {name: found[name] for name in found if name not in TOLD} == {
        name: expected[name] for name in expected if name not in TOLD
    }


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp", "passthrough"])
def test_the_same_model(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for ending in ("", ".bin"):
        chosen = {**recipe(folders, ending), "merge_method": method}
        if method in ("slerp", "passthrough"):
            chosen["models"] = chosen["models"][:1]
        if method == "slerp":
            chosen = {**chosen, "models": [{"model": chosen["models"][0]["model"]}], "parameters": {"t": 0.4}}
        if method == "passthrough":
            chosen = {"merge_method": method, "models": [{"model": chosen["models"][0]["model"]}]}
        if method in ("ties", "dare_ties"):
            chosen["parameters"] = {"density": 1.0}
        mergekit_ray.merge(chosen, tmp_path / f"out{ending[1:]}", options=LOCAL)
    assert_same(contents(tmp_path / "outbin"), contents(tmp_path / "out"))
    assert verify(str(tmp_path / "outbin")).ok


def test_reproduced_and_changed(folders: dict[str, Path], tmp_path: Path) -> None:
    places = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("a.bin", "b.bin", "c.bin")}
    mergekit_ray.merge(recipe(places, ".bin"), tmp_path / "out", options=LOCAL)
    assert reproduce(tmp_path / "out", tmp_path / "again").ok
    file = places["a.bin"] / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    data[data.index(b"layers.0")] ^= 1  # a name in the pickle, at the file's beginning
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError):
        reproduce(tmp_path / "out", tmp_path / "third")


def test_single_files_of_every_ending(tmp_path: Path) -> None:
    tensors = [{"unet.weight": torch.randn(4, 3), "bias": torch.randn(3)} for _ in range(3)]
    save_file(tensors[0], tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors[1], "epoch": 1}, tmp_path / "b.pth")
    torch.save(tensors[2], tmp_path / "c.ckpt")
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("a.safetensors", "b.pth", "c.ckpt")
    ]
    mergekit_ray.merge({"merge_method": "linear", "models": models}, tmp_path / "out", options=LOCAL)
    found = load_file(tmp_path / "out/model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, sum(each[name] for each in tensors) / 3)


def test_an_adapter(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    old = shutil.copytree(adapter, tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    for name in ("adapter", "old"):
        models = [{"model": f"{tmp_path}/base+{tmp_path}/{name}"}]
        mergekit_ray.merge({"merge_method": "passthrough", "models": models}, tmp_path / f"out-{name}", options=LOCAL)
    assert_same(contents(tmp_path / "out-old"), contents(tmp_path / "out-adapter"))


@pytest.mark.s3
@pytest.mark.ray
def test_by_ray_from_s3_to_s3(
    folders: dict[str, Path], s3_environment: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    bucket = Bucket(s3_environment, s3_prefix)
    names = ("a.bin", "b.bin", "c.bin")
    places = {name: bucket.upload(folders[name], name.replace(".", "-")) for name in names}
    mergekit_ray.merge(recipe(folders), tmp_path / "expected", options=LOCAL)
    with RayCluster(num_nodes=2):
        options = MergeOptions(executor="ray", num_workers=2)
        mergekit_ray.merge(recipe(places, ".bin"), f"{bucket.uri}/out", options=options)
    assert_same(contents(bucket.download("out", tmp_path / "out")), contents(tmp_path / "expected"))
