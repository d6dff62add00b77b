"""The output's ``config.json``: the donor's, with what the merge changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergekit_ray.architectures.anatomy import LAYER_COUNT_KEYS, language_config, language_levels, stated, stating
from mergekit_ray.architectures.quantisation_config import without_quantisation
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError

_DTYPE_KEYS = ("dtype", "torch_dtype")

_BEYOND_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Numbers of layers beyond the stack proper (multi-token prediction), which a stack that is cut anew does not keep."""

_INDEX_KEYS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs")
"""Lists of the indices of the layers that are of one kind (Qwen-MoE, Llama 4, Mllama, Bamba, Jamba-like)."""

_PREFIX_KEYS = ("first_k_dense_replace", "max_window_layers")
"""Numbers of leading layers that are of another kind than the rest: DeepSeek's dense ones, Qwen2's without a window."""

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

    Raises:
        PlanError: layers of two kinds are so mixed that the config cannot say it.
    """
    config = without_quantisation(copy.deepcopy(dict(donor)))  # what is stored is never codes
    levels = cast(list[dict[str, Any]], language_levels(config))  # parts of our own copy
    if layers is not None:
        for level in levels:
            _set_layers(level, layers)
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
    for part in (changed, cast(dict[str, Any], language_config(changed))):
        part |= {key: 0 for key in _BEYOND_KEYS if key in part}
    return changed


def _set_layers(inner: dict[str, Any], layers: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Set the number of layers, and cut all that config says of single layers the way the layers were cut."""
    for key in _BEYOND_KEYS:
        if key in inner:
            inner[key] = 0
    old = next((inner[key] for key in LAYER_COUNT_KEYS if key in inner), None)
    for key in LAYER_COUNT_KEYS:
        if key in inner:
            inner[key] = len(layers)
    if not isinstance(old, int):
        return
    prefixes = [key for key in _PREFIX_KEYS if key != "max_window_layers" or inner.get("use_sliding_window")]
    for key, value in inner.items():
        if key in _INDEX_KEYS and isinstance(value, list):
            inner[key] = [place for place, (config, index) in enumerate(layers) if index in _listed(config, key)]
        elif key in prefixes and isinstance(value, int) and value > 0:
            inner[key] = _prefix(key, layers, told_elsewhere=key == "max_window_layers" and "layer_types" in inner)
        elif isinstance(value, list) and len(value) == old and not key.endswith(_NOT_PER_LAYER):
            inner[key] = _recut(key, value, layers)


def _recut(key: str, value: Sequence[Any], layers: Sequence[tuple[Mapping[str, Any], int]]) -> list[Any]:
    """What each layer's own model says of it; what the donor says where that model says nothing."""
    cut = []
    for config, index in layers:
        theirs = _listed(config, key)
        cut.append(theirs[index] if index < len(theirs) else value[index % len(value)])
    return cut


def _listed(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = stated(config, key)
    return found if isinstance(found, list) else ()


def _prefix(key: str, layers: Sequence[tuple[Mapping[str, Any], int]], *, told_elsewhere: bool) -> int:
    """How many of the new layers are leading ones in their models; they must still lead.

    Args:
        key: what the config calls the number.
        layers: for each output layer, the config it comes from and its layer there.
        told_elsewhere: the kind of each layer is listed too, and the list is what is read; then the number is that of
            the layers that do lead.

    Raises:
        PlanError: they are not all in front, which no such number can say.
    """
    counts = [stated(config, key) for config, _ in layers]
    leads = [isinstance(count, int) and index < count for count, (_, index) in zip(counts, layers, strict=True)]
    number = leads.index(False) if False in leads else len(leads)
    if any(leads[number:]) and not told_elsewhere:
        misplaced = leads.index(True, number)
        raise PlanError(
            f"output layer {misplaced} is one of the first {counts[misplaced]} of its model, which are of another kind "
            f"than the rest ({key}), and comes after one that is not",
            where="slices",
            remedy=f"put the slices that hold the layers counted by {key} first",
        )
    return number
