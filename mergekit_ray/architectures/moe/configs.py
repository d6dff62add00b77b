"""Configs of dense models, written out in full: what a dense class takes for granted an MoE class may not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ray.architectures.moe.family import GATE, DenseModel
from mergekit_ray.core.errors import ModelError

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "olmo2": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
}
"""What transformers' dense classes assume where ``config.json`` says nothing."""

_ALL_DEFAULTS: Mapping[str, Any] = {"hidden_act": "silu", "num_attention_heads": 32, "attention_dropout": 0.0}
_DEFAULT_THETA = 10000.0
_NOT_INHERITED = ("architectures", "auto_map", "mlp_bias", "model_type", "pretraining_tp")


def expanded(base: DenseModel) -> dict[str, Any]:
    """The base's config with sizes as its tensors have them, defaults spelt out, and both spellings of RoPE's settings.

    Keys that belong to the dense class alone are left out.

    Raises:
        ModelError: its number of heads is not one, or does not fit its tensors.
    """
    given = copy.deepcopy(dict(base.config))
    config = {key: value for key, value in given.items() if key not in _NOT_INHERITED}
    for key, value in {**_ALL_DEFAULTS, **_DEFAULTS.get(base.model_type, {})}.items():
        config.setdefault(key, value)
    inner, hidden = base.shape(GATE)
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": base.anatomy.num_layers}
    heads, rows = config["num_attention_heads"], base.shape("self_attn.q_proj.weight")[0]
    if type(heads) is not int or heads < 1 or rows < heads or rows % heads:
        raise ModelError(
            f"config.json gives num_attention_heads as {heads!r:.200}, which does not divide the {rows} rows of q_proj",
            where=f"model {base.reference}",
            remedy="correct its config.json, or download the checkpoint again",
        )
    head_dim = rows // heads
    config["num_key_value_heads"] = base.shape("self_attn.k_proj.weight")[0] // head_dim
    if config.get("head_dim") is None:
        config.pop("head_dim", None)  # null is not "as usual" to every class
        if head_dim * config["num_attention_heads"] != hidden:
            config["head_dim"] = head_dim
    if base.anatomy.embedding is not None:
        config["vocab_size"] = base.specs[base.anatomy.embedding].shape[0]
    return {**config, **rope_settings(config)}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings as transformers 5 writes them (``rope_parameters``) and as everyone did before.

    Where both are given, transformers reads ``rope_scaling``; so do we.
    """
    new, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    new = new if isinstance(new, Mapping) else {}
    if any(isinstance(value, Mapping) for value in new.values()):
        return {}  # one set for each type of layer: the old spelling has no words for it
    settings = dict(scaling) if isinstance(scaling, Mapping) and scaling else dict(new)
    theta = settings.pop("rope_theta", None) or config.get("rope_theta") or new.get("rope_theta") or _DEFAULT_THETA
    kind = settings.get("rope_type") or settings.get("type") or "default"
    parameters = {key: value for key, value in settings.items() if key != "type"} | {"rope_type": kind}
    old = {**settings, "rope_type": kind} if kind != "default" else None
    return {"rope_theta": theta, "rope_scaling": old, "rope_parameters": {**parameters, "rope_theta": theta}}


def layer_windows(base: DenseModel) -> list[int | None]:
    """For each layer the width of its attention window in tokens, None for no window."""
    config = {**_DEFAULTS.get(base.model_type, {}), **base.config}
    num_layers = base.anatomy.num_layers
    window = config.get("sliding_window")
    if base.model_type == "mistral":
        return [window] * num_layers
    if not config.get("use_sliding_window") or window is None:
        return [None] * num_layers
    types = config.get("layer_types")
    if not isinstance(types, Sequence) or len(types) != num_layers:
        first = config["max_window_layers"]
        return [window if layer >= first else None for layer in range(num_layers)]
    return [window if kind == "sliding_attention" else None for kind in types]
