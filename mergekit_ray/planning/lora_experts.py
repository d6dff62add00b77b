"""Adapters of parameters that hold all experts of a layer (PEFT's ``target_parameters``): which tensors they act on.

In memory such a parameter is one of three dimensions. Files have it as that, or each expert's matrices by themselves;
then the gate's outputs come before those of the upward projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ray.architectures.anatomy import language_config
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.matching.names import RENAMED

NESTED = ".base_layer"
"""What PEFT puts behind a module's name for each further parameter that it adapts there."""

_INPUTS_FIRST = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
"""Types of models that keep experts as inputs by outputs. A square matrix does not tell."""

_SEPARATE = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Names of a parameter's parts in files that store each expert separately."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The part of a parameter that one tensor holds.

    Attributes:
        tensor: the base's name of it.
        first, number: its experts.
        total: experts of the layer.
        outputs: its rows among the parameter's outputs: the first, and the one after the last.
    """

    tensor: str
    first: int
    number: int
    total: int
    outputs: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of all experts of a layer.

    Attributes:
        name: in memory.
        shape: there: experts, outputs, inputs; or experts, inputs, outputs.
        parts: the base's tensors that hold it.
    """

    name: str
    shape: tuple[int, int, int]
    parts: tuple[Experts, ...]

    def transposed(self, product: tuple[int, int], config: Mapping[str, Any]) -> bool | None:
        """Whether a product ``[outputs, inputs]`` is added to it transposed; None if it does not fit."""
        _, rows, columns = self.shape
        if product not in ((rows, columns), (columns, rows)) or (product != (rows, columns) and len(self.parts) > 1):
            return None
        if rows == columns and len(self.parts) == 1:
            return str(language_config(config).get("model_type")) in _INPUTS_FIRST
        return product != (rows, columns)


def parameter(
    module: str, name: str, find: Callable[[str], str | None], specs: Mapping[str, TensorSpec]
) -> Parameter | None:
    """A parameter of a layer's experts, as the base stores it; None if it has none.

    Args:
        module: the experts' module, in memory.
        name: of the parameter there.
        find: gives the base's name of a tensor.
        specs: the base's tensors.
    """
    whole = find(f"{module}.{name}")
    if whole is not None and len(shape := specs[whole].shape) == 3:
        part = Experts(whole, 0, shape[0], shape[0], (0, shape[1]))
        return Parameter(f"{module}.{name}", (shape[0], shape[1], shape[2]), (part,))
    places = [module, *(module.replace(old, new) for old, new in RENAMED if old in module)]
    for leaves in _SEPARATE.get(name, ()):
        for place in places:
            found = _separate(place, leaves, find)
            if found:
                return _joined(f"{module}.{name}", found, specs)
    return None


def _separate(module: str, leaves: tuple[str, ...], find: Callable[[str], str | None]) -> list[tuple[str, ...]]:
    """The tensors of each expert, by their order."""
    experts: list[tuple[str, ...]] = []
    while True:
        found = [find(f"{module}.{len(experts)}.{leaf}.weight") for leaf in leaves]
        named = tuple(name for name in found if name is not None)
        if len(named) < len(leaves):
            return experts
        experts.append(named)


def _joined(name: str, experts: list[tuple[str, ...]], specs: Mapping[str, TensorSpec]) -> Parameter | None:
    parts = []
    for expert, tensors in enumerate(experts):
        start = 0
        for tensor in tensors:
            shape = specs[tensor].shape
            if shape != specs[experts[0][0]].shape or len(shape) != 2:
                return None
            parts.append(Experts(tensor, expert, 1, len(experts), (start, start + shape[0])))
            start += shape[0]
    rows, columns = specs[experts[0][0]].shape
    return Parameter(name, (len(experts), rows * len(experts[0]), columns), tuple(parts))
