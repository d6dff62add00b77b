"""Every parameter of every method that mergekit has too, changed: the values, and the recipes that hold them.

Each method is merged twice: as its `_START` says, and with one parameter changed for each tensor, by filters. So two
short merges try all values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from parity.recipes import RECIPES, Recipe

SHARED: Final = sorted({recipe.method for recipe in RECIPES})
"""The methods that mergekit has too."""

_START: Final[Mapping[str, Mapping[str, Any]]] = {
    "breadcrumbs": {"density": 0.7, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.1},
    "ties": {"density": 0.6},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01, "alpha": 10.0},
    "nearswap": {"t": 0.01},
    "slerp": {"t": 0.4},
    "karcher": {"tol": 1e-9},
}
"""By method: parameters that have no default, and those with whose defaults others have no effect."""

_RANDOM: Final = ("dare_linear", "dare_ties", "della", "della_linear")
"""Whose masks each program draws for itself; test_parity.py compares what they keep."""

VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "weight": (0.0, 1.0, -0.3),
    "density": (1.0, 0.3, 0.0),  # of methods that drop at random, without 0.3
    "gamma": (0.2, 0.01, 0.0),
    "epsilon": (0.1, 0.02),
    "lambda": (0.0, 0.5, 2.0),
    "normalize": (False, True),
    "rescale": (False, True),
    "int8_mask": (False, True),
    "normalize_weights": (False, True),
    "nuslerp_flatten": (False, True),
    "nuslerp_row_wise": (False, True),
    "filter_wise": (False, True),
    "eps": (1e-8, 1e-3),
    "max_iter": (1, 3),
    "tol": (1e-5, 0.1),
    "t": (0.0, 0.5, 1.0),
    "scale": (0.0, 1.0, 0.5),
    "select_topk": (0.0, 0.2, 1.0),
    "r": (0.0, 0.5, 1.0),
    "alpha": (0.0, 0.1, 1.0),
}
"""By name of the parameter, in whichever method."""

TENSORS: Final = [
    f"layers.{layer}.{part}"
    for layer in range(4)
    for part in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
]
"""Of the checkpoints that are merged: in each there is room for one change."""


@dataclass(frozen=True)
class Change:
    """One parameter's value for one tensor.

    Attributes:
        parameter: its name.
        value: what it is changed to.
        tensor: part of the tensor's name.
    """

    parameter: str
    value: Any
    tensor: str


def changes(method: str) -> list[Change]:
    """Every value of every parameter of a method."""
    wanted = [
        (name, value)
        for name in METHODS.get(method).parameter_names()
        for value in VALUES[name]
        if not (method in _RANDOM and (name, value) == ("density", 0.3))
    ]
    return [Change(name, value, tensor) for (name, value), tensor in zip(wanted, TENSORS, strict=False)]


def recipe(method: str, changed: Sequence[Change] = ()) -> Recipe:
    """A method with its parameters as at the start, but for what is changed."""
    declared = METHODS.get(method)
    start = _START.get(method, {})
    levels: dict[str, dict[str, Any]] = {"model": {}, "global": {}}
    for name, scope in declared.parameter_names().items():
        entries: list[dict[str, Any]] = [
            {"filter": change.tensor, "value": change.value} for change in changed if change.parameter == name
        ]
        first = {"weight": 0.6, **start}.get(name)
        if first is not None or entries:
            levels[scope][name] = [*entries, *([] if first is None else [{"value": first}])]
    others = {**levels["model"], **({"weight": 0.7} if "weight" in levels["model"] else {})}
    names = ["base", "a"] if declared.base_is_input else ["a", "b", "c"][: declared.max_models]
    models = [{"model": f"{{{name}}}", "parameters": others if i else levels["model"]} for i, name in enumerate(names)]
    data: dict[str, Any] = {"merge_method": method, "models": models, "parameters": levels["global"]}
    if declared.base is BaseUse.REQUIRED:
        data["base_model"] = "{base}"
    return Recipe(f"{method}, {'changed' if changed else 'start'}", method, yaml.safe_dump(data))
