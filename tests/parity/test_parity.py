"""Every recipe, merged by mergekit and by us, is the same checkpoint within the published tolerances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parity.comparison import Numbers, compare, difference_units, load_checkpoint, read_tolerances
from parity.recipes import RECIPES, Recipe

pytestmark = pytest.mark.parity

TOLERANCES = read_tolerances()
MergeBoth = Callable[[Recipe, str], tuple[Path, Path]]


def cases() -> list[Any]:
    return [
        pytest.param(recipe, numbers, id=f"{recipe.name}-{numbers}")
        for recipe in RECIPES
        for method, numbers in TOLERANCES
        if method == recipe.method
    ]


@pytest.mark.parametrize(("recipe", "numbers"), cases())
def test_same_checkpoint(recipe: Recipe, numbers: Numbers, merge_both: MergeBoth) -> None:
    ours_folder, theirs_folder = merge_both(recipe, numbers.yaml)
    ours, theirs = load_checkpoint(ours_folder), load_checkpoint(theirs_folder)
    if recipe.family.endswith("-tied"):
        # mergekit writes the second name of tied weights or not, from case to case. Ours are written once.
        assert "lm_head.weight" not in ours
        theirs.pop("lm_head.weight", None)
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {
        name: (x.shape, x.dtype) for name, x in theirs.items()
    }

    tolerance = TOLERANCES[recipe.method, numbers]
    found = compare(ours, theirs, numbers.arithmetic, tolerance.units)

    assert found.beyond_percent <= tolerance.beyond_percent, found
    assert found.differing_percent <= tolerance.differing_percent, found


@pytest.mark.parametrize("name", ["linear", "frankenmerge", "slerp, Qwen2", "linear, Qwen3"])
def test_same_config(name: str, merge_both: MergeBoth) -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == name)
    configs = [json.loads((folder / "config.json").read_text()) for folder in merge_both(recipe, "dtype: float32\n")]
    keys = ("architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    ours, theirs = ({key: config.get(key) for key in keys} for config in configs)
    assert ours == theirs


def random_drop(method: str, density: float, *, rescale: bool) -> Recipe:
    """A recipe whose result shows which elements were dropped: one model, weight 1."""
    document = {
        "merge_method": method,
        "base_model": "{base}",
        "models": [{"model": "{a}", "parameters": {"weight": 1.0, "density": density}}],
        "parameters": {"rescale": rescale},
    }
    return Recipe(f"{method} {density}", method, yaml.safe_dump(document))


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_have_the_same_statistics(
    method: str,
    rescale: bool,
    density: float,
    merge_both: MergeBoth,
    family: Callable[[str], dict[str, Path]],
) -> None:
    """Masks cannot be equal, so both programs must meet the same description of a DARE result."""
    base, tuned = (load_checkpoint(family("llama")[name]) for name in ("base", "a"))
    folders = merge_both(random_drop(method, density, rescale=rescale), "dtype: float32\n")
    # mergekit adds up the norms that rescaling divides by in float32.
    for folder, tolerated_units in zip(folders, (2, 16), strict=True):
        merged = load_checkpoint(folder)
        num_kept = num_elements = 0
        for name, tensor in merged.items():
            delta = tuned[name] - base[name]
            kept = tensor != base[name]
            factor = float(delta.double().abs().sum() / delta[kept].double().abs().sum()) if rescale else 1.0
            expected = torch.where(kept, base[name].double() + factor * delta.double(), base[name].double()).float()
            assert float(difference_units(tensor, expected, torch.float32).max()) <= tolerated_units, (
                folder.name,
                name,
            )
            num_kept += int(kept.sum())
            num_elements += kept.numel()
        # A binomial's mean within five standard deviations: fails by chance once in a million and a half.
        deviation = (num_kept - density * num_elements) / (density * (1 - density) * num_elements) ** 0.5
        assert abs(deviation) < 5, folder.name


def test_every_method_of_the_recipes_has_a_tolerance() -> None:
    assert {method for method, _ in TOLERANCES} == {recipe.method for recipe in RECIPES}
