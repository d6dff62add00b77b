"""The layers of a frankenmerge, compared with those that they come from."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Order = list[tuple[str, int]]
"""For each layer of the output, the name of the model that it comes from, and its number there."""

_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")
_OF_PLACE = re.compile(
    r"(\w+_)?idx|(layer|block)_?(id|index|num|number)|index|seed|training|lambda_init|num_hidden_layers"
    r"|store_full_length_kv"
)
"""Attributes that follow from where a layer stands, whatever its kind. No config can say DIFF Transformer's lambdas; in
Gemma 3n and 4 the last layer of a kind stores what later ones share.
"""

_SIMPLE = (bool, int, float, str, type(None))


def text_layers(config: Any) -> int | None:
    """The number of layers of the language model that a config describes."""
    text = config.get_text_config(decoder=True)
    written = text.to_dict()
    for known in (written.get, lambda key: getattr(text, key, None)):
        for key in _COUNT_KEYS:
            if isinstance(count := known(key), int):
                return count
    return None


def stacks_of(ours: Mapping[str, Any], theirs: Mapping[str, Any], order: Order) -> list[str]:
    """The prefixes of numbered modules that were cut: as many as the layers in each model."""
    counts, before = _numbered(ours), _numbered(theirs)
    depth = max(layer for _, layer in order) + 1
    return [prefix for prefix, count in counts.items() if count == len(order) and before.get(prefix) == depth]


def expected_after_slices(
    ours: Mapping[str, torch.Tensor], sources: Mapping[str, Mapping[str, torch.Tensor]], order: Order
) -> dict[str, torch.Tensor]:
    """What a frankenmerge must hold: layers in the recipe's order, all else the first model's.

    What has a part for each layer outside of them (an embedding per layer) has its parts in the same order.

    Args:
        ours: the tensors that are judged, of which only names and shapes are used.
        sources: the models' tensors, by the model's name.
        order: of the layers.
    """
    first = sources[order[0][0]]
    cut = stacks_of(ours, first, order)
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in first.items():
        found = _place(name)
        if found is None or found[0] not in cut:
            expected[name] = _parts(tensor, ours.get(name), [sources[model][name] for model in _models(order)], order)
    for place, (model, layer) in enumerate(order):
        for name, tensor in sources[model].items():
            found = _place(name)
            if found is not None and found[0] in cut and found[1] == layer:
                expected[f"{found[0]}.{place}.{found[2]}"] = tensor
    return expected


def different_kinds(merged: Any, sources: Mapping[str, Any], stacks: Sequence[str], order: Order) -> str:
    """In what a layer behaves otherwise than the layer that it comes from; empty if none does."""
    for stack in stacks:
        for place, (model, layer) in enumerate(order):
            ours = _kind(merged.get_submodule(f"{stack}.{place}"))
            theirs = _kind(sources[model].get_submodule(f"{stack}.{layer}"))
            for key in sorted(ours.keys() | theirs.keys()):
                if not _is_same(ours.get(key), theirs.get(key)):
                    return f"layer {place}, {key}: {ours.get(key)} instead of {theirs.get(key)} as in layer {layer}"
    text, before = (model.config.get_text_config(decoder=True).to_dict() for model in (merged, sources[order[0][0]]))
    depth = max(layer for _, layer in order) + 1
    for key, listed in before.items():
        if isinstance(listed, list) and len(listed) == depth:
            expected = _expected_list(listed, order)
            if text.get(key) != expected:
                return f"config.json, {key}: {text.get(key)} instead of {expected}"
    return ""


def _is_same(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


def _expected_list(listed: list[Any], order: Order) -> list[Any]:
    """What a list as long as there were layers must be: one entry a layer, or the numbers of some layers, here all."""
    if listed == list(range(len(listed))):
        return list(range(len(order)))
    return [listed[layer] for _, layer in order]


def _kind(layer: Any) -> dict[str, Any]:
    """All that tells how a layer's modules compute: their classes, and plain attributes but for those of its place."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in layer.named_modules()
        for key, value in {**vars(module), "class": type(module).__name__}.items()
        if isinstance(value, _SIMPLE) and not key.startswith("_") and not _OF_PLACE.fullmatch(key)
    }


def _models(order: Order) -> list[str]:
    return [model for model, _ in order]


def _parts(
    tensor: torch.Tensor, ours: torch.Tensor | None, theirs: Sequence[torch.Tensor], order: Order
) -> torch.Tensor:
    """A tensor whose parts along some axis are of single layers, if that is what made it longer; else as it is."""
    depth = max(layer for _, layer in order) + 1
    if ours is None or ours.shape == tensor.shape or ours.dim() != tensor.dim():
        return tensor
    for axis, (new, old) in enumerate(zip(ours.shape, tensor.shape, strict=True)):
        if new * depth == old * len(order):
            parts = [each.chunk(depth, axis)[layer] for each, (_, layer) in zip(theirs, order, strict=True)]
            return torch.cat(parts, axis)
    return tensor


def _numbered(names: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for name in names:
        place = _place(name)
        if place is not None:
            found[place[0]] = max(found[place[0]], place[1] + 1)
    return found


def _place(name: str) -> tuple[str, int, str] | None:
    """The stack, layer and rest of a name with a number in it."""
    match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
    return (match[1], int(match[2]), match[3]) if match else None
