"""What goes wrong in a stage is said of that stage, and is an error whatever the later ones make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray import MergeOptions
from mergekit_ray.core.errors import MergeError, PlanError
from support.tokenizers.models import byte_level, save_model

LOCAL = MergeOptions(executor="local", device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(save_model(root / name, byte_level(), seed, dtype=torch.bfloat16)) for seed, name in enumerate("ab")
    }


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.5}),
        ("slerp", {"t": 0.5}),
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.5, "density": 0.3}),
        ("dare_ties", {"weight": 0.5, "density": 0.1}),
        ("della", {"weight": 0.5, "density": 0.2, "epsilon": 0.1}),
        ("nearswap", {"t": 0.1}),
        ("passthrough", {}),
    ],
)
def test_what_an_earlier_stage_cannot_hold(
    method: str, parameters: dict[str, float], folders: dict[str, str], tmp_path: Path
) -> None:
    """Even if the later stage drops most of it, or could hold it."""
    huge = [{"model": folders[name]} for name in "ab"]
    first = {
        "name": "first",
        "merge_method": "linear",
        "models": huge,
        "parameters": {"weight": 1e7, "normalize": False},
        "dtype": "float16",
    }
    later: dict[str, Any] = {"merge_method": method, "models": [{"model": "first"}], "parameters": parameters}
    if method == "linear":
        later["models"].append({"model": folders["a"]})
    elif method != "passthrough":
        later["base_model"] = folders["a"]
    with pytest.raises(MergeError) as found:
        mergekit_ray.merge({"stages": [first, {**later, "dtype": "float32"}]}, tmp_path / "out", options=LOCAL)
    assert found.value.what.startswith("the merged values of one of the stages overflow float16 or float32")
    assert not (tmp_path / "out/config.json").exists()


def test_plans_name_the_stage(folders: dict[str, str], tmp_path: Path) -> None:
    def deep(model: str) -> dict[str, Any]:
        return {"merge_method": "passthrough", "slices": [{"sources": [{"model": model, "layer_range": [0, 99]}]}]}

    first = {"name": "first", "merge_method": "linear", "parameters": {"weight": 1}}
    models = [{"model": folders["b"]}, {"model": "first"}]
    with pytest.raises(PlanError) as found:
        mergekit_ray.merge(
            {"stages": [{"name": "first", **deep(folders["a"])}, {**first, "name": "last", "models": models}]},
            tmp_path / "out",
        )
    assert str(found.value.where).startswith("stage first: ")
    whole = {**first, "models": [{"model": folders["a"]}]}
    with pytest.raises(PlanError) as found:
        mergekit_ray.merge({"stages": [whole, deep("first")]}, tmp_path / "out")
    assert str(found.value.where).startswith("the last stage: ")
