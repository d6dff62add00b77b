"""Methods that add to a base, with nothing to add: the base, whole or cut anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.config.load import RecipeWarning
from mergekit_ray.core.registry import METHODS
from support.models import config_of, tensors_of
from support.tokenizers.models import byte_level, save_model

ADDING = [name for name in METHODS.names() if METHODS.get(name).adds_to_base()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", byte_level(), 1, num_hidden_layers=4)


def test_those_methods_are_the_ones_on_task_vectors() -> None:
    assert {"task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "sce", "ram"} <= set(ADDING)
    assert not {"slerp", "nearswap", "linear", "model_stock", "arcee_fusion"} & set(ADDING)


@pytest.mark.parametrize("method", ADDING)
def test_the_base_comes_out(method: str, base: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": method, "base_model": str(base), "models": [{"model": str(base)}]}
    with pytest.warns(RecipeWarning, match="of no model beside the base model is the base model"):
        mergekit_ray.merge(recipe, tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_some_of_its_layers(base: Path, tmp_path: Path) -> None:
    cuts: list[dict[str, Any]] = [{"sources": [{"model": str(base), "layer_range": [i, i + 2]}]} for i in (2, 0)]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "slices": cuts, "dtype": "float16"}
    with pytest.warns(RecipeWarning, match="of no model beside the base"):
        mergekit_ray.merge(recipe, tmp_path / "out")
    found, own = tensors_of(tmp_path / "out"), tensors_of(base)
    name = "model.layers.{}.mlp.up_proj.weight"
    for out, layer in enumerate((2, 3, 0, 1)):
        assert torch.equal(found[name.format(out)], own[name.format(layer)].half())
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4
