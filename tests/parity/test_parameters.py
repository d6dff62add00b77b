"""Changing a parameter changes the result as it does in mergekit, or, as there, not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_ray.core.registry import METHODS
from parity.changes import SHARED, TENSORS, VALUES, changes, recipe
from parity.comparison import load_checkpoint
from parity.recipes import Recipe

MergeBoth = Callable[[Recipe, str], tuple[Path, Path]]
FLOAT32 = "dtype: float32\n"
LEAST = 1e-6
"""Weights are about 0.02, changes of them no smaller than 1e-3; rounding is about 1e-8."""


@pytest.mark.parametrize("method", SHARED)
def test_every_parameter_has_values_to_try(method: str) -> None:
    names = METHODS.get(method).parameter_names()
    assert {change.parameter for change in changes(method)} == set(names)
    assert sum(len(VALUES[name]) for name in names) <= len(TENSORS)


def test_every_value_is_tried() -> None:
    assert {name for method in SHARED for name in METHODS.get(method).parameter_names()} == VALUES.keys()


@pytest.mark.parity
@pytest.mark.parametrize("method", [method for method in SHARED if METHODS.get(method).parameter_names()])
def test_same_effects(method: str, merge_both: MergeBoth) -> None:
    changed = changes(method)
    ours_before, theirs_before = map(load_checkpoint, merge_both(recipe(method), FLOAT32))
    ours, theirs = map(load_checkpoint, merge_both(recipe(method, changed), FLOAT32))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=LEAST)
    for change in changed:
        (name,) = (name for name in theirs if change.tensor in name)
        effects = [
            float((after[name] - before[name]).abs().max()) > LEAST
            for after, before in ((ours, ours_before), (theirs, theirs_before))
        ]
        assert effects[0] == effects[1], change
