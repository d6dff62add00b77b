"""Models that transformers knows under other names than their files': seen as if they had been saved by it.

Nothing is read or copied for it. A tensor in which several lie one below the other is seen as its runs of rows, whose
bytes are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.tensors import Location, TensorSpec

_Tensors: TypeAlias = dict[str, tuple[TensorSpec, Location]]

_MSFT_OUTER = {
    "transformer.embd.wte": "model.embed_tokens",
    "lm_head.ln": "model.final_layernorm",
    "lm_head.linear": "lm_head",
}
_MSFT_LAYER = {
    "ln": "input_layernorm",
    "mixer.out_proj": "self_attn.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_MSFT_STACK = "transformer.h."


def as_transformers_has_it(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the config and the names of transformers' own class; itself if it has these, or none is known.

    Raises:
        ModelError: a tensor of a layout that is known is not as its config says.
    """
    convert = _LAYOUTS.get(str(checkpoint.config.get("model_type")))
    return checkpoint if convert is None else convert(checkpoint)


def _phi_msft(checkpoint: Checkpoint) -> Checkpoint:
    """Phi-1.5 and Phi-2 as Microsoft first published them: queries, keys and values are one matrix."""
    config = checkpoint.config
    heads = _number(checkpoint, "n_head")
    width = _number(checkpoint, "n_embd")
    if not heads or width % heads:
        raise ModelError(f"config.json says {heads} heads for a width of {width}", where=checkpoint.reference)
    head_dim, groups = width // heads, config.get("n_head_kv") or heads
    rows = {"q_proj": heads * head_dim, "k_proj": groups * head_dim, "v_proj": groups * head_dim}
    tensors: _Tensors = {}
    for name, (spec, location) in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        layer, _, rest = module.removeprefix(_MSFT_STACK).partition(".")
        if not module.startswith(_MSFT_STACK):
            tensors[f"{_MSFT_OUTER.get(module, module)}.{leaf}"] = spec, location
        elif rest == "mixer.Wqkv":
            attention = f"model.layers.{layer}.self_attn"
            named = {f"{attention}.{part}.{leaf}": count for part, count in rows.items()}
            tensors |= _runs_of_rows(checkpoint, spec, location, named)
        else:
            tensors[f"model.layers.{layer}.{_MSFT_LAYER.get(rest, rest)}.{leaf}"] = spec, location
    known: dict[str, Any] = {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "vocab_size": config.get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": config.get("n_inner") or 4 * width,
        "num_hidden_layers": _number(checkpoint, "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_act": config.get("activation_function", "gelu_new"),
        "max_position_embeddings": config.get("n_positions", 2048),
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        # The class multiplies and rounds down: a quotient that was rounded down would lose a dimension.
        "partial_rotary_factor": math.nextafter(min(config.get("rotary_dim", 32), head_dim) / head_dim, 1.0),
        "tie_word_embeddings": False,
    }
    return replace(checkpoint, config=known, tensors=tensors)


def _number(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if not isinstance(value, int):
        raise ModelError(f"config.json gives {key} as {value!r}, which is not a number", where=checkpoint.reference)
    return value


def _runs_of_rows(checkpoint: Checkpoint, spec: TensorSpec, location: Location, rows: Mapping[str, int]) -> _Tensors:
    """A row-major tensor as tensors of these numbers of rows, from the first on."""
    if spec.shape[:1] != (sum(rows.values()),):
        raise ModelError(
            f"{spec.name} has shape {list(spec.shape)}, and config.json asks for {sum(rows.values())} rows",
            where=checkpoint.reference,
        )
    found: _Tensors = {}
    start = location.start
    for name, count in rows.items():
        part = TensorSpec(name, spec.dtype, (count, *spec.shape[1:]))
        found[name] = part, Location(location.file, start, start + part.num_bytes)
        start += part.num_bytes
    return found


_LAYOUTS: Mapping[str, Callable[[Checkpoint], Checkpoint]] = {"phi-msft": _phi_msft}
"""By ``model_type``."""
