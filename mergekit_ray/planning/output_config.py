"""The output's ``config.json``: the donor's, with what the merge changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from mergekit_ray.architectures.anatomy import (
    LAYER_COUNT_KEYS,
    configured_layers,
    count_keys,
    language_config,
    language_levels,
    language_view,
    stating,
)
from mergekit_ray.architectures.layer_kinds import rules_of
from mergekit_ray.architectures.layer_rules import SLIDING, Rule, family_of, items
from mergekit_ray.architectures.quantisation_config import without_quantisation
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError

Layers: TypeAlias = Sequence[tuple[Mapping[str, Any], int]]
"""For each output layer, the config of the model it comes from and its layer there."""

_DTYPE_KEYS = ("dtype", "torch_dtype")

_BEYOND_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Numbers of layers beyond the stack proper (multi-token prediction), which a stack that is cut anew does not keep."""

_PATTERN_KEYS = ("hybrid_override_pattern", "index_topk_pattern")
"""Strings with a letter for each layer (Nemotron-H, DeepSeek's indexers)."""

_PARTS_WITH_LISTS = ("sparse_attention_config",)
"""Parts of a config that hold lists with an item for each layer (MiniMax-M3)."""

_NOT_PER_LAYER = ("_id", "_ids", "architectures", "_token", "_factor", "_section")
"""Endings of keys whose lists are of something else, should they happen to be as long as there are layers."""


_WIDTHS = {SLIDING: "sliding_window", "chunked_attention": "attention_chunk_size"}
"""How many positions layers of a kind attend to."""


def output_config(
    donor: Mapping[str, Any],
    *,
    layers: Layers | None,
    stacks: Mapping[str, int],
    main: str | None,
    dtype: DType | None,
    tied: bool | None,
    vocab_size: int | None,
) -> dict[str, Any]:
    """Adapt a config.

    Args:
        donor: the config to start from.
        layers: for each output layer of the main stack, the config it comes from and its layer there; None if the
            layers are the donor's own.
        stacks: the donor's, with their numbers of layers.
        main: the stack whose layers they are.
        dtype: what most weights are stored in, None to leave it.
        tied: whether the output's head is its embedding, None if it has no such pair.
        vocab_size: new number of rows of the embedding, None to leave it.

    Returns:
        A new dictionary.

    Raises:
        PlanError: layers of two kinds are so mixed that the config cannot say it.
    """
    config = without_quantisation(copy.deepcopy(dict(donor)))  # what is stored is never codes
    levels = cast(list[dict[str, Any]], language_levels(config))  # parts of our own copy
    if layers is not None:
        views = {id(source): language_view(source) for source, _ in layers}
        counts = [count_keys(level, main, stacks) for level in levels]
        default = None if any(counts) else stacks.get(main or "", 0)
        for level, keys in zip(levels, counts, strict=True):
            _set_layers(level, keys, default, [(views[id(source)], index) for source, index in layers])
        if default is not None and levels[1:]:
            levels[-1]["num_hidden_layers"] = len(layers)  # it left the number to the family's default
    if dtype is not None:
        parts = [(part, key) for key in _DTYPE_KEYS for part in stating(config, key)] or [(config, "torch_dtype")]
        for part, key in parts:
            part[key] = dtype.config_name
    if tied is not None:
        for part in stating(config, "tie_word_embeddings") or [config]:
            part["tie_word_embeddings"] = tied
    if vocab_size is not None:
        for part in stating(config, "vocab_size") or [cast(dict[str, Any], language_config(config))]:
            part["vocab_size"] = vocab_size
    return config


def without_beyond(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that counts no layers beyond the stack proper."""
    changed = copy.deepcopy(dict(config))
    for key in _BEYOND_KEYS:
        for part in stating(changed, key):
            part[key] = 0
    return changed


def _set_layers(level: dict[str, Any], counts: Sequence[str], default: int | None, layers: Layers) -> None:
    """Set the number of layers, and cut all that config says of single layers the way the layers were cut.

    Args:
        level: what is changed.
        counts: the keys under which it gives their number.
        default: how many layers the donor has if no level counts them; None if another level does.
        layers: for each output layer, all that its model's config says of the language model, and its layer there.
    """
    beyond = max((level[key] for key in _BEYOND_KEYS if isinstance(level.get(key), int)), default=0)
    for key in _BEYOND_KEYS:
        if key in level:
            level[key] = 0
    old = level[counts[0]] if counts else default
    if old is None:
        return
    # Another number under another name is of something else.
    level |= {key: len(layers) for key in counts if level[key] == old or key not in LAYER_COUNT_KEYS}
    if isinstance(scale := level.get("scale_depth"), int | float) and old > 0:
        # MiniCPM divides it by the root of the number of layers: so each still adds as much as in its model.
        level["scale_depth"] = scale * math.sqrt(len(layers) / old)
    _recut(level, (old, old + beyond), layers)
    _take_windows(level, layers)
    _set_kinds(level, layers)


def _recut(part: dict[str, Any], lengths: Sequence[int], layers: Layers, within: tuple[str, ...] = ()) -> None:
    """Cut all that has an item for each layer, in place."""
    for key, value in part.items():
        if key == "per_layer_config" and isinstance(value, dict):
            part[key] = {str(place): own for place, own in enumerate(_own_configs(layers)) if own is not None}
        elif key == "kv_source_layers" and isinstance(value, list):
            part[key] = _sources_of_keys(key, layers)
        elif key in _PARTS_WITH_LISTS and isinstance(value, dict):
            _recut(value, lengths, layers, (*within, key))
        elif key not in _PATTERN_KEYS and (key.endswith(_NOT_PER_LAYER) or not isinstance(value, list)):
            continue
        elif isinstance(value, list | str) and value and len(value) in lengths:
            items = [_item(config, (*within, key), index, value) for config, index in layers]
            part[key] = "".join(items) if isinstance(value, str) else items


def _item(config: Mapping[str, Any], path: Sequence[str], index: int, donors: Sequence[Any]) -> Any:
    """What a layer's own model says of it; what the donor says where that model says nothing."""
    theirs = config.get(path[0])
    for key in path[1:]:
        theirs = theirs.get(key) if isinstance(theirs, Mapping) else None
    if isinstance(theirs, list | str) and isinstance(theirs, type(donors)) and index < len(theirs):
        return theirs[index]
    return donors[index % len(donors)]


def _own_configs(layers: Layers) -> Iterator[Any]:
    """What configs change for single layers, by their index."""
    for config, index in layers:
        theirs = config.get("per_layer_config")
        yield theirs.get(str(index)) if isinstance(theirs, Mapping) else None


def _sources_of_keys(key: str, layers: Layers) -> list[int]:
    """For each layer the place of the one whose keys and values it uses: the last before it that was the same."""
    last: dict[tuple[int, int], int] = {}
    found = []
    for place, (config, index) in enumerate(layers):
        last[id(config), index] = place
        theirs = config.get(key)
        given = theirs[index] if isinstance(theirs, list) and index < len(theirs) else None
        source = given if isinstance(given, int) else index
        if (id(config), source) not in last:
            raise PlanError(
                f"output layer {place}, layer {index} of its model, uses the keys and values of layer {source} there "
                f"({key}), which does not come before it",
                where="slices",
                remedy=f"choose slices that have layer {source} of that model before its layer {index}",
            )
        found.append(last[id(config), source])
    return found


def _take_windows(level: dict[str, Any], layers: Layers) -> None:
    """Where the config has no window, give it that of the first layer that attends to one."""
    rule = next((rule for rule in rules_of(level) if rule.key == "layer_types"), None)
    kinds: dict[int, Sequence[Any]] = {}
    for config, index in layers:
        if id(config) not in kinds:
            counted = configured_layers(config) or 0
            kinds[id(config)] = (
                items(config, "layer_types") if rule is None else rule.kinds(_as(level, rule, config), counted)
            )
        kind = kinds[id(config)][index] if index < len(kinds[id(config)]) else None
        key = _WIDTHS.get(kind) if isinstance(kind, str) else None
        if key is None or config.get(key) is None:
            continue
        is_switched_on = key == "sliding_window" and config.get("use_sliding_window") is True
        if is_switched_on and level.get("use_sliding_window") is not True:
            level |= {"use_sliding_window": True, key: config[key]}
        elif key in level and level[key] is None:
            level[key] = config[key]


def _set_kinds(level: dict[str, Any], layers: Layers) -> None:
    """Write the kind of each layer into the config, where kinds follow from the layer's index.

    Raises:
        PlanError: the config cannot say it.
    """
    rules = rules_of(level)
    own = {rule.key for rule in rules if family_of(level) in rule.families}
    configs = {id(config): config for config, _ in layers}
    checks = []
    for rule in rules:
        kinds = {
            key: rule.kinds(_as(level, rule, config), configured_layers(config) or 0) for key, config in configs.items()
        }
        wanted = [kinds[id(config)][index] for config, index in layers if index < len(kinds[id(config)])]
        if len(wanted) < len(layers):
            continue  # a model that does not count its layers says nothing of their kinds
        is_told = any(key in own or level.get(key) is not None for key in rule.told_by)
        is_there = rule.is_indices and isinstance(level.get(rule.key), list | int)
        if is_there or (rule.kinds(level, len(layers)) != wanted and not is_told):
            level.update(rule.say(level, wanted))
        if not is_told:
            checks.append((rule, wanted))
    for rule, wanted in checks:
        found = rule.kinds(level, len(layers))
        if found != wanted:
            place = next(i for i in range(len(layers)) if found[i : i + 1] != wanted[i : i + 1])
            raise PlanError(
                f"output layer {place}, layer {layers[place][1]} of its model, would be of another kind there: "
                f"{rule.key} gives the kinds of layers by their places, and cannot express this order",
                where="slices",
                remedy=f"choose slices whose kinds of layers come in an order that {rule.key} can express",
            )


def _as(level: Mapping[str, Any], rule: Rule, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A source's config as one of the family that the rule is of."""
    family = family_of(level)
    return {**config, "model_type": family} if family in rule.families else config
