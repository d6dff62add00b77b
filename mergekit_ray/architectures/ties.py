"""What transformers' classes tie beside the head: tensors that a tied model stores once and reads under several names.

The ties are those of the classes' ``_tied_weights_keys``. With ``tie_word_embeddings: false`` each name is read by
itself, so an untied output has to hold all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergekit_ray.core.tensors import TensorSpec

_SHARED = re.compile(r"(?P<outer>(.+\.)?)(?P<name>shared|word_embeddings)\.weight")
_SIDES = ("encoder", "decoder", "text_encoder", "text_decoder")
"""Parts that embed tokens by a copy of what stands beside them."""

_HEAD_BIAS = re.compile(r"(?P<head>(.+\.)?(predictions|lm_head))\.bias")
_BEFORE_BIAS = ("dense.weight", "transform.dense.weight")
"""What a masked language model's head has before its ``decoder``, whose bias is the head's own."""

_SHARED_LAYERS = frozenset({"zamba", "zamba2"})
"""Families whose attention layers use one block in turn, stored with the first of them."""

_TIED_OTHERWISE = _SHARED_LAYERS | {"udop", "fsmt", "t5gemma2", "diffusion_gemma", "blt"}
"""Families whose classes tie more than `unstored_copies` finds."""


def unstored_copies(specs: Mapping[str, TensorSpec], embedding: str | None) -> dict[str, str]:
    """The names that a tied model's files leave out beside the head, each with the stored tensor that it copies.

    Args:
        specs: of all its tensors.
        embedding: the name of its input embedding.
    """
    if embedding is None:
        return {}
    found: dict[str, str] = {}
    if shared := _SHARED.fullmatch(embedding):
        name = "embed_tokens" if shared["name"] == "shared" else "word_embeddings"
        for side in (f"{shared['outer']}{side}" for side in _SIDES):
            if any(stored.startswith(f"{side}.") for stored in specs):
                found[f"{side}.{name}.weight"] = embedding
    for stored, spec in specs.items():
        bias = _HEAD_BIAS.fullmatch(stored)
        if bias is None or spec.shape != specs[embedding].shape[:1] or f"{bias['head']}.weight" in specs:
            continue
        if any(f"{bias['head']}.{name}" in specs for name in _BEFORE_BIAS):
            found[f"{bias['head']}.decoder.bias"] = stored
    return {name: original for name, original in found.items() if name not in specs}


def ties_more(config: Mapping[str, Any]) -> bool:
    """Whether a model's class ties what `unstored_copies` does not find, so that it cannot be untied."""
    return str(config.get("model_type")) in _TIED_OTHERWISE


def shares_layers(config: Mapping[str, Any]) -> bool:
    """Whether layers of a model use each other's weights."""
    return str(config.get("model_type")) in _SHARED_LAYERS
