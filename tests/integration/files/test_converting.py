"""`convert`: a model whose weights are pickled becomes safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergekit_ray
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.operations.options import MergeOptions
from support.merging import run_command
from support.models import ModelLibrary, contents, load, logits, tensors_of

HERE = MergeOptions(executor="local")


def pickled(source: Path, folder: Path, *, change: Callable[[Any], Any] = lambda x: x) -> Path:
    """A copy of a model with its weights pickled, beside what a trainer leaves there."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(change(tensors_of(source)), folder / "pytorch_model.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    return folder


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
    folder = pickled(models.get("llama", 1), tmp_path / "pickled")
    done = run_command("mergekit-ray", "convert", folder, tmp_path / "out", "--max-shard-size", "60KB")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = run_command("mergekit-ray", "convert", folder, tmp_path / "out", "--max-shard-size", "60KB")
    assert "already holds the result" in again.stderr


def test_a_single_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(6.0).reshape(2, 3)}, "epoch": 3}, tmp_path / "unet.ckpt")
    result = mergekit_ray.convert(tmp_path / "unet.ckpt", tmp_path / "out", options=HERE)
    assert torch.equal(load_file(tmp_path / "out/unet.safetensors")["a"], torch.arange(6.0).reshape(2, 3))
    assert [warning for warning in result.plan.warnings if "'epoch' is not read" in warning]


def test_what_is_not_weights_is_refused_before_anything_is_written(models: ModelLibrary, tmp_path: Path) -> None:
    folder = pickled(models.get("llama", 1), tmp_path / "pickled")
    torch.save({"model.embed_tokens.weight": torch.ones(2), "path": tmp_path}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the pickle cannot be read as data: .* 'pathlib\."):
        mergekit_ray.convert(folder, tmp_path / "out", options=HERE)
    assert not (tmp_path / "out").exists()
