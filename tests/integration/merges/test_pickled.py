"""Models whose weights are pickled: merged as the same weights in safetensors are, and converted to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.operations.options import MergeOptions
from support.merging import run_command
from support.models import ModelLibrary, contents, load, logits, tensors_of
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

HERE = MergeOptions(executor="local")


def pickled(source: Path, folder: Path, *, num_files: int = 1, change: Callable[[Any], Any] = lambda x: x) -> Path:
    """A copy of a model with its weights pickled."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(source)
    names = sorted(tensors)
    files = {f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin": names[i::num_files] for i in range(num_files)}
    if num_files == 1:
        files = {"pytorch_model.bin": names}
    else:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, held in files.items():
        torch.save(change({name: tensors[name] for name in held}), folder / file)
    torch.save({"state": {}}, folder / "optimizer.pt")
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith((".safetensors", ".index.json"))}


@pytest.fixture
def bucket(s3_server: S3Server, s3_prefix: str) -> Bucket:
    """A place of its own on the server."""
    return Bucket(s3_server, s3_prefix)


def recipe(*folders: Path | str, method: str = "linear") -> dict[str, Any]:
    listed = [{"model": str(folder), "parameters": {"weight": 0.3 + i}} for i, folder in enumerate(folders)]
    return {"merge_method": method, "models": listed, "output": {"max_shard_size": "60KB"}}


@pytest.mark.parametrize("num_files", [1, 3])
def test_the_merge_is_that_of_the_same_weights_in_safetensors(
    models: ModelLibrary, tmp_path: Path, num_files: int
) -> None:
    sources = [models.get("llama", variant) for variant in range(2)]
    others = [pickled(source, tmp_path / f"p{i}", num_files=num_files) for i, source in enumerate(sources)]
    mergekit_ray.merge(recipe(*sources), tmp_path / "ours", options=HERE)
    mergekit_ray.merge(recipe(*others), tmp_path / "theirs", options=HERE)
    assert weights_of(tmp_path / "ours") == weights_of(tmp_path / "theirs")
    assert not [name for name in contents(tmp_path / "theirs") if name.endswith((".bin", ".pt"))]


@pytest.mark.s3
def test_from_s3(bucket: Bucket, s3_environment: object, models: ModelLibrary, tmp_path: Path) -> None:
    sources = [models.get("llama", variant) for variant in range(2)]
    uris = [bucket.upload(pickled(source, tmp_path / f"p{i}"), f"in{i}") for i, source in enumerate(sources)]
    mergekit_ray.merge(recipe(*sources), tmp_path / "ours", options=HERE)
    mergekit_ray.merge(recipe(*uris), tmp_path / "theirs", options=HERE)
    assert weights_of(tmp_path / "ours") == weights_of(tmp_path / "theirs")


@pytest.mark.parametrize("tied", [False, True])
def test_converting(models: ModelLibrary, tmp_path: Path, tied: bool) -> None:
    source = models.get("llama", 1, tied=tied, with_tokenizer=True)

    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As a state dict has it: the head of tied weights is the embedding."""
        return {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors} if tied else tensors

    folder = pickled(source, tmp_path / "pickled", change=with_head)
    result = mergekit_ray.convert(folder, tmp_path / "out", options=HERE)
    assert result.uri == str(tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    assert contents(tmp_path / "out")["tokenizer.json"] == contents(source)["tokenizer.json"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(source)))


def test_converting_on_the_command_line(models: ModelLibrary, tmp_path: Path) -> None:
    folder = pickled(models.get("llama", 1), tmp_path / "pickled", num_files=2)
    done = run_command("mergekit-ray", "convert", folder, tmp_path / "out", "--max-shard-size", "60KB")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = run_command("mergekit-ray", "convert", folder, tmp_path / "out", "--max-shard-size", "60KB")
    assert "already holds the result" in again.stderr


def test_what_is_not_weights_is_refused_before_anything_is_written(models: ModelLibrary, tmp_path: Path) -> None:
    folder = pickled(models.get("llama", 1), tmp_path / "pickled")
    torch.save({"model.embed_tokens.weight": torch.ones(2), "path": tmp_path}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the pickle names pathlib\."):
        mergekit_ray.convert(folder, tmp_path / "out", options=HERE)
    assert not (tmp_path / "out").exists()
