"""Whether layers that are cut anew still fit the code of their family: the tensors in each, and those outside."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

from mergekit_ray.architectures.anatomy import (
    GROUP_COUNT_KEY,
    configured_layers,
    count_keys,
    is_buffer,
    language_levels,
    language_view,
)
from mergekit_ray.architectures.layer_kinds import rules_of
from mergekit_ray.architectures.ties import shares_layers
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.lowering import Model

T = TypeVar("T")

_LIST_ITEM = re.compile(r"\.\d+$")
"""The end of the name of a parameter in a list of parameters."""

_GOING_TOGETHER = ("cross_layer_interval", "num_layers_per_stack", GROUP_COUNT_KEY, "num_mem_blocks")
"""Keys of families whose layers go with those of another stack (IDEFICS, HRM), or share weights (ALBERT, Zamba2)."""

_VECTOR = re.compile(r"(norm\w*|ln_f)\.weight$|bias$")
"""Names of tensors with an element for each hidden unit; there may be as many units as layers."""


def check_layer_order(donor: Model, layers: Sequence[tuple[Model, int]]) -> None:
    """Check that layers which the config does not tell apart keep their order where their tensors differ.

    T5's first block has a table of relative positions, Zamba's first attention the weights that later ones share: no
    key says so. Of such layers the first in the output has to be like the first in the donor, and so on.

    Args:
        donor: whose config the output gets.
        layers: for each output layer, the model it comes from and its layer there.

    Raises:
        PlanError: they do not.
    """
    told = _told(donor)
    own: dict[str, list[frozenset[str]]] = defaultdict(list)
    for index, kind in enumerate(told):
        own[kind].append(_names(donor, index))
    if all(len(set(names)) == 1 for names in own.values()):
        return
    by_model = {donor.key: told}
    counts: dict[str, int] = defaultdict(int)
    for place, (model, index) in enumerate(layers):
        if model.key not in by_model:
            by_model[model.key] = _told(model)
        kind = by_model[model.key][index]
        expected = expected_at(own[kind], counts[kind]) if kind in own else None
        counts[kind] += 1
        found = _names(model, index)
        if expected is not None and found != expected:
            name = min(found ^ expected)
            raise PlanError(
                f"output layer {place} is layer {index} of its model, "
                f"{'with' if name in found else 'without'} {name!r}: layers of {donor.reference} differ in it, and "
                "config.json does not say which have it",
                where=f"slices, model {model.reference}",
                remedy="choose slices that keep layers with different tensors in their places",
            )


def check_is_counted(donor: Model, layers: Sequence[tuple[Model, int]]) -> None:
    """Check that the config says how many layers there are, and that one stack holds all of each layer.

    Args:
        donor: whose config the output gets.
        layers: for each output layer, the model it comes from and its layer there.

    Raises:
        PlanError: it does not, or XLM's way: a list of attentions, one of feed-forward networks, and so on.
    """
    stack, count = donor.anatomy.main, donor.anatomy.num_layers
    where, remedy = f"slices, model {donor.reference}", "merge all layers in their order, without slices"
    if shares_layers(donor.checkpoint.config) and any(model is not donor for model, _ in layers):
        raise PlanError(
            f"layers of {stack!r} share weights, which slices of several models would mix", where=where, remedy=remedy
        )
    if stack is None or [index for _, index in layers] == list(range(count)):
        return
    parent = stack.rpartition(".")[0]
    for other, its_count in donor.anatomy.stacks.items():
        if other != stack and its_count == count and other.rpartition(".")[0] == parent:
            raise PlanError(
                f"each layer is spread over several lists, such as {stack!r} and {other!r}; slices cut only one",
                where=where,
                remedy=remedy,
            )
    levels = language_levels(donor.checkpoint.config)
    if key := next((key for key in _GOING_TOGETHER for level in levels if level.get(key)), None):
        raise PlanError(
            f"{key} says that layers of {stack!r} share weights, or go with those of other stacks: they cannot be cut",
            where=where,
            remedy=remedy,
        )
    pair = stack.replace("decoder", "encoder")
    for level in levels if pair != stack and pair in donor.anatomy.stacks else ():
        shared = set(count_keys(level, stack, (stack, pair))) & set(count_keys(level, pair, (stack, pair)))
        if shared:
            raise PlanError(
                f"config.json gives the number of layers of {stack!r} and of {pair!r} under one key, {min(shared)}",
                where=where,
                remedy="add num_decoder_layers, or the key that the family has for it, to its config.json",
            )
    lists = (value for level in levels for value in level.values() if isinstance(value, list))
    if len(levels) == 1 and not count_keys(levels[0], stack) and all(len(value) != count for value in lists):
        raise PlanError(
            f"no known key in config.json gives the number of layers of {stack!r}, so it cannot change",
            where=where,
            remedy=remedy,
        )


def check_nothing_by_layer(donor: Model, layers: Sequence[tuple[Model, int]]) -> None:
    """Check that no tensor outside the layers has a part for each layer, unless all layers are taken in their order.

    Args:
        donor: who gives what is outside the layers.
        layers: for each output layer, the model it comes from and its layer there.

    Raises:
        PlanError: one has.
    """
    count = donor.anatomy.num_layers
    if [index for _, index in layers] == list(range(count)):
        return
    width = language_view(donor.checkpoint.config).get("hidden_size_per_layer_input")
    for name in (*donor.anatomy.before, *donor.anatomy.after):
        shape = donor.weights.specs[name].shape
        if _LIST_ITEM.search(name):
            siblings = [other for other in donor.anatomy.after if _LIST_ITEM.sub("", other) == _LIST_ITEM.sub("", name)]
            has_parts = len(siblings) in (count - 1, count)
        else:
            has_parts = shape == (count,) and not _VECTOR.search(name)
            has_parts |= "per_layer" in name and isinstance(width, int) and width > 0 and count * width in shape
        if has_parts:
            raise _by_layer(donor, name, shape)
    for stack, parts in donor.anatomy.layers.items():
        if stack == donor.anatomy.main or len(parts) != count:
            continue
        names = [f"{stack}.{index}.{rest}" for index, rests in enumerate(parts) for rest in rests]
        if names and all(donor.weights.specs[name].num_elements == 1 for name in names):
            raise _by_layer(donor, names[0], donor.weights.specs[names[0]].shape)


def _by_layer(donor: Model, name: str, shape: Sequence[int]) -> PlanError:
    return PlanError(
        f"this model stores something for each layer outside the layers: {name!r}, of shape {list(shape)}",
        where=f"slices, model {donor.reference}",
        remedy="such tensors cannot be cut with the layers: merge all layers in their order, without slices",
    )


def _names(model: Model, index: int) -> frozenset[str]:
    layers = model.anatomy.layers.get(model.anatomy.main or "", ())
    return frozenset(name for name in layers[index] if not is_buffer(name)) if index < len(layers) else frozenset()


def kinds_of(model: Model) -> list[dict[str, Any]]:
    """Of which kinds the config says each layer to be, by the key that says it: ``layer_types: full_attention``."""
    config = language_view(model.checkpoint.config)
    count = configured_layers(config) or model.anatomy.num_layers
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    told: dict[str, Sequence[Any]] = {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and len(value) == count and all(isinstance(kind, str) for kind in value)
    }
    for level in language_levels(model.checkpoint.config):
        for rule in rules_of(level):
            if rule.can_be_said and not any(config.get(key) is not None for key in rule.told_by):
                told[rule.key] = rule.kinds({**config, **level}, count)
    for key, kinds in told.items():
        for layer, kind in zip(found, kinds, strict=False):
            layer[key] = kind
    return found


def _told(model: Model) -> list[str]:
    """What the config says of each layer, in any form that can be compared."""
    config = language_view(model.checkpoint.config)
    count = configured_layers(config) or model.anatomy.num_layers
    told: list[list[Any]] = [[] for _ in range(count)]
    for level in language_levels(model.checkpoint.config):
        for rule in rules_of(level):
            for kinds, kind in zip(told, rule.kinds({**config, **level}, count), strict=False):
                kinds.append(kind)
    for value in config.values():
        if isinstance(value, list) and len(value) == count:
            for kinds, kind in zip(told, value, strict=True):
                kinds.append(kind)
    return [repr(kinds) for kinds in told]


def expected_at(names: Sequence[frozenset[T]], place: int) -> frozenset[T] | None:
    """The names in some place of a sequence that goes on as it began; None if it does not say how."""
    if place < len(names) or not names:
        return names[place] if names else None
    if len([i for i in range(1, len(names)) if names[i] != names[i - 1]]) <= 1:
        return names[-1]
    periods = (p for p in range(2, len(names) // 2 + 1) if all(names[i] == names[i - p] for i in range(p, len(names))))
    period = next(periods, None)
    return None if period is None else names[place % period]
