"""With ``compute_dtype: inputs`` arithmetic is done in ``dtype``, as mergekit does it: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity.comparison import load_checkpoint
from parity.recipes import RECIPES, Recipe

pytestmark = pytest.mark.parity


ELEMENTWISE = ("linear", "task_arithmetic", "passthrough", "dare_linear")
"""Methods whose every element depends on the same element of the models, and on nothing random (dare drops nothing)."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.family == "llama" and r.method in ELEMENTWISE], ids=lambda r: r.name
)
def test_same_bits(recipe: Recipe, dtype: str, merge_both: Callable[[Recipe, str], tuple[Path, Path]]) -> None:
    folders = merge_both(recipe, f"dtype: {dtype}\ncompute_dtype: inputs\n")
    ours, theirs = (load_checkpoint(folder) for folder in folders)
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different


def test_same_bits_of_nearswap(merge_both: Callable[[Recipe, str], tuple[Path, Path]]) -> None:
    """Only in bfloat16: in float16 mergekit makes NaN of what is equal, in float32 we round once and it three times."""
    (recipe,) = (recipe for recipe in RECIPES if recipe.method == "nearswap")
    folders = merge_both(recipe, "dtype: bfloat16\ncompute_dtype: inputs\n")
    ours, theirs = (load_checkpoint(folder) for folder in folders)
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
