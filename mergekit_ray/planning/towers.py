"""Stacks beside the main one (encoders, towers of other modalities) that modules cut anew: their place in the config.

If the config cannot express the result, the recipe is refused: with a wrong config, transformers invents layers, or
loses some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergekit_ray.architectures.anatomy import (
    LAYER_COUNT_KEYS,
    TEXT_CONFIG_KEYS,
    count_keys,
    is_buffer,
    language_levels,
    modality_of,
)
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.layer_order import expected_at
from mergekit_ray.planning.lowering import Model

_COUNT_KEYS = (*LAYER_COUNT_KEYS, "depth", "encoder_layers", "num_encoder_layers")
"""Names under which the config of a tower gives its number of layers."""

_BY_INDEX = re.compile(r"layer|block|depth|index|indices")
"""Names of lists with an entry for single layers."""

_FEATURES = re.compile(r"(vision|image|audio)\w*feature_layers?$")
"""Names of the layers, outside the tower's own config, that a projector takes features from; -2 is the last but one."""


def set_tower(config: dict[str, Any], donor: Model, stack: str, layers: Sequence[tuple[Model, int]]) -> None:
    """Set the number of a tower's layers, in place.

    Args:
        config: the output's ``config.json``.
        donor: whose config it was.
        stack: the tower's.
        layers: for each layer of the output, the model it comes from and its layer there.

    Raises:
        PlanError: the config does not tell the tower's number of layers, or it tells more of single layers; or a layer
            is not like the donor's at its place.
    """
    _check_layers(donor, stack, layers)
    old = donor.anatomy.stacks[stack]
    modality = modality_of(stack)
    if modality is None:
        part, keys = _level_counting(config, donor, stack)
    else:
        part, keys = _part_counting(config, modality, old)
        features = [(key, value) for key, value in config.items() if _FEATURES.search(key)]
        _check_nothing_by_index(donor, stack, [(k, v) for k, v in features if _is_from_the_front(v)])
        by_index = [(k, v) for k, v in part.items() if isinstance(v, list) and (_BY_INDEX.search(k) or len(v) == old)]
        _check_nothing_by_index(donor, stack, by_index)
    if not keys:
        raise PlanError(
            f"config.json has no key of its own for the number of layers of {stack!r}, so it cannot change",
            where=f"modules, model {donor.reference}",
            remedy="merge all its layers in their order, without slices",
        )
    part |= dict.fromkeys(keys, len(layers))


def _level_counting(config: dict[str, Any], donor: Model, stack: str) -> tuple[dict[str, Any], list[str]]:
    """The part of a config that counts an encoder's or a decoder's layers, and its keys that no other stack has."""
    anatomy = donor.anatomy
    old = anatomy.stacks[stack]
    for level in cast(list[dict[str, Any]], language_levels(config)):
        keys = count_keys(level, stack, anatomy.stacks)
        mains = count_keys(level, anatomy.main, anatomy.stacks)
        if keys and not set(keys) & set(mains) and all(level[key] == old for key in keys):
            return level, keys
    return config, []


def _part_counting(config: dict[str, Any], modality: re.Pattern[str], old: int) -> tuple[dict[str, Any], list[str]]:
    """The one part of a config that is of a modality and counts as many layers, and its keys."""
    found = []
    for level in (config, *(config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict))):
        for name, part in level.items():
            if modality.search(name.lower()) and isinstance(part, dict):
                keys = [key for key in _COUNT_KEYS if part.get(key) == old]
                found += [(part, keys)] if keys else []
    return found[0] if len(found) == 1 else (config, [])


def _is_from_the_front(value: object) -> bool:
    places = value if isinstance(value, list) else [value]
    return any(isinstance(place, int) and place >= 0 for place in places)


def _check_nothing_by_index(donor: Model, stack: str, found: Sequence[tuple[str, Any]]) -> None:
    if found:
        key, value = found[0]
        raise PlanError(
            f"{key} ({value}) tells single layers of {stack!r} by their places, which slices change",
            where=f"modules, model {donor.reference}",
            remedy="merge all its layers in their order, without slices",
        )


def _check_layers(donor: Model, stack: str, layers: Sequence[tuple[Model, int]]) -> None:
    """Check that each layer has the tensors and shapes that the donor's has, or would have, at its place."""
    own = [frozenset(_shapes(donor, stack, index).items()) for index in range(donor.anatomy.stacks[stack])]
    for place, (model, index) in enumerate(layers):
        found = frozenset(_shapes(model, stack, index).items())
        expected = expected_at(own, place)
        if found != expected:
            name, shape = min(found ^ (expected or frozenset()))
            raise PlanError(
                f"output layer {place} of {stack!r} is layer {index} of its model, where {name!r} of shape "
                f"{list(shape)} makes it unlike the layer that {donor.reference} has there",
                where=f"modules, model {model.reference}",
                remedy="take layers of one shape, and leave those with tensors of their own where they are",
            )


def _shapes(model: Model, stack: str, index: int) -> Mapping[str, tuple[int, ...]]:
    layers = model.anatomy.layers.get(stack, ())
    names = (name for name in (layers[index] if index < len(layers) else ()) if not is_buffer(name))
    return {name: model.weights.specs[f"{stack}.{index}.{name}"].shape for name in names}
