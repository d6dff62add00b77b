"""The output's ``config.json``: the donor's, with what the merge changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergekit_ray.architectures.anatomy import LAYER_COUNT_KEYS, language_config
from mergekit_ray.core.dtypes import DType

_DTYPE_KEYS = ("dtype", "torch_dtype")

_BEYOND_KEYS = ("num_nextn_predict_layers",)
"""Numbers of layers beyond the stack proper (multi-token prediction), which a stack that is cut anew does not keep."""

_NOT_PER_LAYER = ("_id", "_ids", "architectures", "_token", "_factor", "_section")
"""Endings of keys whose lists are of something else, should they happen to be as long as there are layers."""


def output_config(
    donor: Mapping[str, Any],
    *,
    layers: Sequence[tuple[Mapping[str, Any], int]] | None,
    dtype: DType | None,
    tied: bool | None,
    vocab_size: int | None,
) -> dict[str, Any]:
    """Adapt a config.

    Args:
        donor: the config to start from.
        layers: for each output layer of the main stack, the config it comes from and its layer there; None if the
            layers are the donor's own.
        dtype: what most weights are stored in, None to leave it.
        tied: whether the output's head is its embedding, None if it has no such pair.
        vocab_size: new number of rows of the embedding, None to leave it.

    Returns:
        A new dictionary.
    """
    config: dict[str, Any] = copy.deepcopy(dict(donor))
    inner = cast(dict[str, Any], language_config(config))  # a part of our own copy
    if layers is not None:
        _set_layers(inner, layers)
    if dtype is not None:
        parts = [config] if inner is config else [config, inner]
        if not any(key in part for part in parts for key in _DTYPE_KEYS):
            config["torch_dtype"] = dtype.config_name
        for part in parts:
            for key in _DTYPE_KEYS:
                if key in part:
                    part[key] = dtype.config_name
    if tied is not None:
        part = inner if "tie_word_embeddings" in inner and "tie_word_embeddings" not in config else config
        part["tie_word_embeddings"] = tied
    if vocab_size is not None:
        inner["vocab_size"] = vocab_size
    return config


def _set_layers(inner: dict[str, Any], layers: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Set the number of layers and cut every per-layer list the way the layers were cut."""
    for key in _BEYOND_KEYS:
        if key in inner:
            inner[key] = 0
    old = next((inner[key] for key in LAYER_COUNT_KEYS if key in inner), None)
    for key in LAYER_COUNT_KEYS:
        if key in inner:
            inner[key] = len(layers)
    if not isinstance(old, int):
        return
    for key, value in inner.items():
        if not isinstance(value, list) or len(value) != old or key.endswith(_NOT_PER_LAYER):
            continue
        cut = []
        for config, index in layers:
            theirs = language_config(config).get(key)
            cut.append(theirs[index] if isinstance(theirs, list) and index < len(theirs) else value[index % old])
        inner[key] = cut
