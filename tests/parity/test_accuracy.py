"""Both programs against the exact result: the formula in float64 on the models as they are stored.

The exact result is our own merge with ``compute_dtype: float64``, which unit tests hold against references written
apart from it. ``python -m benchmarks.accuracy`` prints the errors as a table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch

from parity.comparison import load_checkpoint
from parity.conftest import MergeOurs
from parity.recipes import RECIPES, Recipe

pytestmark = pytest.mark.parity

SLACK = 1.02
"""Two ways to round the same number are on average equally far from it; which is nearer is chance."""


def errors(merged: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square error of each tensor, relative to its root mean square."""
    return {
        name: float((merged[name].double() - x).square().mean().sqrt() / x.square().mean().sqrt().clamp_min(1e-300))
        for name, x in exact.items()
    }


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.family == "llama"], ids=lambda r: r.name)
def test_at_least_as_close(
    recipe: Recipe,
    merge_both: Callable[[Recipe, str], tuple[Path, Path]],
    merge_ours: MergeOurs,
    record_property: Callable[[str, object], None],
) -> None:
    exact = load_checkpoint(merge_ours(recipe, "dtype: float64\ncompute_dtype: float64\n"))
    ours, theirs = (errors(load_checkpoint(folder), exact) for folder in merge_both(recipe, "dtype: bfloat16\n"))
    record_property("accuracy", (recipe.method, recipe.name, mean(ours.values()), mean(theirs.values())))
    further = [name for name, error in ours.items() if error > SLACK * theirs[name]]
    assert not further
