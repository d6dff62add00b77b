"""Whole merges with ``--device cuda``: the files of ``--device cpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.options import MergeOptions
from support.device_cases import assert_close
from support.memory_inputs import random_llama, write_model
from support.merging import Events

pytestmark = pytest.mark.gpu

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    base = random_llama(0, num_layers=3, hidden=256)
    tuned = [
        {
            name: (x.float() + 0.02 * y.float()).to(x.dtype)
            for (name, x), y in zip(base.items(), other.values(), strict=True)
        }
        for other in (random_llama(seed, num_layers=3, hidden=256) for seed in (1, 2))
    ]
    return [write_model(folder / f"model-{i}", tensors, CONFIG) for i, tensors in enumerate([base, *tuned])]


def recipe(method: str, models: list[Path]) -> dict[str, Any]:
    base, *tuned = models
    if method == "linear":
        return {"merge_method": method, "models": [{"model": str(m), "parameters": {"weight": 0.4}} for m in models]}
    if method == "slerp":
        listed = [{"model": str(base)}, {"model": str(tuned[0])}]
        return {"merge_method": method, "base_model": str(base), "models": listed, "parameters": {"t": [0, 0.5, 1]}}
    listed = [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.5}} for m in tuned]
    return {"merge_method": method, "base_model": str(base), "models": listed}


def merged(method: str, models: list[Path], out: Path, device: str, **options: Any) -> dict[str, torch.Tensor]:
    mergekit_ray.merge(
        {**recipe(method, models), "seed": 1}, out, options=MergeOptions(executor="local", device=device, **options)
    )
    [file] = out.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties", "della", "breadcrumbs"])
def test_the_files_of_the_cpu(method: str, models: list[Path], device_name: str, tmp_path: Path) -> None:
    expected = merged(method, models, tmp_path / "cpu", "cpu")
    found = merged(method, models, tmp_path / "cuda", device_name)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if method in ("linear", "ties"):
            assert torch.equal(found[name], tensor)
        else:
            assert_close(found[name], tensor)


def test_the_device_is_used_unless_told_otherwise(models: list[Path], device_name: str, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats(device_name)
    before = torch.cuda.max_memory_allocated(device_name)
    merged("ties", models, tmp_path / "cpu", "cpu")
    assert torch.cuda.max_memory_allocated(device_name) == before
    merged("ties", models, tmp_path / "auto", "auto")
    assert torch.cuda.max_memory_allocated(device_name) > before


def test_two_workers(models: list[Path], device_name: str, tmp_path: Path) -> None:
    one = merged("ties", models, tmp_path / "one", device_name, num_workers=1)
    two = merged("ties", models, tmp_path / "two", device_name, num_workers=2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_input_publishes_nothing(models: list[Path], device_name: str, tmp_path: Path) -> None:
    tensors = load_file(models[0] / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name].view(-1)[7] = float("nan")
    damaged = write_model(tmp_path / "damaged", tensors, CONFIG)
    events, out = Events(), tmp_path / "out"
    with pytest.raises(MergekitRayError) as caught:
        mergekit_ray.merge(
            recipe("linear", [models[1], damaged]), out, options=MergeOptions(device=device_name), reporter=events
        )
    assert str(damaged) in str(caught.value)
    assert name in str(caught.value)
    assert not list(out.glob("*.safetensors*"))
