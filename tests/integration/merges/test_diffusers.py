"""A model of a diffusers pipeline: merged like any other, under the names that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.core.errors import PlanError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import contents, tensors_of

CONFIG = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "block_out_channels": [8, 16]}
SHAPES = {
    "conv_in.weight": (8, 3, 3, 3),
    "down_blocks.0.norm.weight": (8,),
    "mid_block.attentions.0.to_q.weight": (8, 8),
}
NAMES = {"diffusion_pytorch_model-00001-of-00001.safetensors", "diffusion_pytorch_model.safetensors.index.json"}


def component(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def recipe(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]}


def test_names_and_numbers(tmp_path: Path) -> None:
    a, b = component(tmp_path / "a" / "unet", 1), component(tmp_path / "b" / "unet", 2)
    out = tmp_path / "out"
    result = mergekit_ray.merge(recipe(a, b), out)
    assert contents(out).keys() == {*NAMES, "README.md", "config.json", "mergekit-ray.json"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert "library_name: diffusers" in (out / "README.md").read_text()
    ours, first, second = tensors_of(out), tensors_of(a), tensors_of(b)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], (first[name] + second[name]) / 2)
    assert verify(open_source(str(out))).problems == []
    assert not result.was_there
    assert mergekit_ray.merge(recipe(a, b), out).was_there
    assert mergekit_ray.merge(recipe(out, b), tmp_path / "again").plan.num_parameters == result.plan.num_parameters


def test_another_is_only_replaced_when_asked(tmp_path: Path) -> None:
    a, b = component(tmp_path / "a", 1), component(tmp_path / "b", 2)
    out = tmp_path / "out"
    mergekit_ray.merge(recipe(a), out)
    with pytest.raises(PlanError, match="is there"):
        mergekit_ray.merge(recipe(b), out)
    mergekit_ray.merge(recipe(b), out, options=MergeOptions(overwrite=True))
    ours, theirs = tensors_of(out), tensors_of(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
    assert verify(open_source(str(out))).problems == []


def test_verify_tells_that_the_index_is_gone(tmp_path: Path) -> None:
    mergekit_ray.merge(recipe(component(tmp_path / "a", 1)), tmp_path / "out")
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (problem, *_) = verify(open_source(str(tmp_path / "out"))).problems
    assert problem.startswith("diffusion_pytorch_model.safetensors.index.json: missing")
