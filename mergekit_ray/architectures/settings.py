"""What ``config.json`` says of how a model uses its tensors, whichever way its family spells it.

Models whose settings differ compute different things with tensors of equal shapes. `STRUCTURE` holds the settings that
make a merge of them meaningless (4 heads of 8 and 2 of 16), `NUANCES` those that may be meant (a longer context).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mergekit_ray.architectures.anatomy import TEXT_CONFIG_KEYS, language_config
from mergekit_ray.architectures.quantisation_config import CONFIG_KEYS

UNSTATED: Final = object()
"""A setting that a config leaves out: it has the family's default, which is not known here."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Something that a config states.

    Attributes:
        name: for messages: what most families call it.
        spellings: the keys it may have; the first one present counts.
        read: its value from a config, or `UNSTATED`; None for what stands under the key.
        null_is_default: null says no more than silence.
    """

    name: str
    spellings: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Any] | None = None
    null_is_default: bool = False

    def value(self, config: Mapping[str, Any]) -> Any:
        """What a config, or a part of one, says; of a list of equal values for all layers, the value."""
        found = _decoded(self.read(config) if self.read is not None else _stated(config, self.spellings))
        if self.null_is_default and found is None:
            return UNSTATED
        if isinstance(found, list) and found and all(each == found[0] for each in found):
            return found[0]
        return found

    def spelling(self, configs: Sequence[Mapping[str, Any]]) -> str:
        """The key under which the first of the configs that has one states it."""
        return next((key for config in configs for key in self.spellings if key in config), self.name)


def parts(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a config says of each of a model's parts: of the language model under ``""``, of towers by their key."""
    return {"": language_config(config), **dict(_towers(config))}


def _towers(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in config.items():
        if not isinstance(value, Mapping) or not key.endswith("_config") or key in CONFIG_KEYS:
            continue
        if key not in TEXT_CONFIG_KEYS:
            yield key, value
        yield from _towers(value)


def _decoded(value: Any) -> Any:
    """A value with the infinities that transformers 5 writes as objects."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, Mapping) and set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
        return float(value["__float__"])
    return value


def _stated(config: Mapping[str, Any], spellings: Sequence[str]) -> Any:
    """The value under the first spelling that has one; null if only nulls are there."""
    there = [config[key] for key in spellings if key in config]
    return next((value for value in there if value is not None), None if there else UNSTATED)


# -- what is spelt in more than one way -------------------------------------------------------------------------------

_THETAS: Final = ("rope_theta", "rotary_emb_base", "rotary_embedding_base", "rotary_base", "rope_base")


def _model_type(config: Mapping[str, Any]) -> Any:
    found = config.get("model_type")
    return found.removesuffix("_text") if isinstance(found, str) else UNSTATED


def _activation(config: Mapping[str, Any]) -> Any:
    """GELUs but CLIP's are one up to rounding, and older configs of Gemma name the wrong one."""
    found = _stated(config, _ACTIVATIONS)
    if not isinstance(found, str):
        return found
    return "gelu" if found.startswith("gelu") else {"swish": "silu"}.get(found, found)


def _rope(config: Mapping[str, Any], *, local: bool) -> Mapping[str, Any]:
    """The rotary parameters of transformers 5, or the scaling of 4: of layers with a sliding window, or of all others.

    Source: transformers, ``modeling_rope_utils``: nested by the layers' kind where they differ.
    """
    places = (config.get("rope_parameters"), config.get("rope_scaling"))
    stated = next((place for place in places if isinstance(place, Mapping)), {})
    nested = {key: value for key, value in stated.items() if isinstance(value, Mapping)}
    if not nested:
        return {} if local else stated
    return next((value for key, value in nested.items() if (key in _LOCAL_LAYERS) == local), {})


_LOCAL_LAYERS: Final = ("sliding_attention", "local_attention", "local")


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """Versions of transformers differ in which of two places they read: both are shown where they disagree."""
    places = [_rope(config, local=False).get("rope_theta"), _stated(config, _THETAS)]
    first, second = (x if isinstance(x, int | float) else UNSTATED for x in places)
    if first in (UNSTATED, second):
        return second
    return first if second is UNSTATED else (first, second)


def _local_theta(config: Mapping[str, Any]) -> Any:
    return _rope(config, local=True).get("rope_theta", config.get("rope_local_base_freq", UNSTATED))


def _rope_scaling(config: Mapping[str, Any]) -> Any:
    """What is left of the rotary parameters: silence means none. Qwen2-VL's sections are no scaling of their own."""
    own = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "type", "rope_type")
    rope = _rope(config, local=False)
    kind = rope.get("rope_type", rope.get("type"))
    rest = {key: rope[key] for key in sorted(rope) if key not in own and rope[key] is not None}
    return {"rope_type": kind, **rest} if kind not in (None, "default", "mrope") else rest or None


def _rotary_share(config: Mapping[str, Any]) -> Any:
    found = _stated(config, _ROTARY_SHARES)
    return _rope(config, local=False).get("partial_rotary_factor", UNSTATED) if found in (UNSTATED, None) else found


def _trained_positions(config: Mapping[str, Any]) -> Any:
    key = "original_max_position_embeddings"
    return _rope(config, local=False).get(key, config.get(key, UNSTATED))


def _window(config: Mapping[str, Any]) -> Any:
    return None if config.get("use_sliding_window") is False else _stated(config, ("sliding_window",))


def _window_layers(config: Mapping[str, Any]) -> Any:
    return config.get("max_window_layers", UNSTATED) if config.get("use_sliding_window") else UNSTATED


def _class(config: Mapping[str, Any]) -> Any:
    """The class of a text model: heads of the same name may mean other things. Multimodal ones have several names."""
    names = config.get("architectures")
    is_text = not any(isinstance(config.get(key), Mapping) for key in TEXT_CONFIG_KEYS)
    return names[0] if is_text and isinstance(names, list) and names and isinstance(names[0], str) else UNSTATED


def _labels(config: Mapping[str, Any]) -> Any:
    """Classes by their ids. What transformers calls classes that were given no names says nothing."""
    found, ids = config.get("id2label"), config.get("label2id")
    if not isinstance(found, Mapping) and isinstance(ids, Mapping):
        found = {str(number): label for label, number in ids.items()}
    if not isinstance(found, Mapping) or all(label == f"LABEL_{number}" for number, label in found.items()):
        return UNSTATED
    return {str(number): label for number, label in found.items()}


_ACTIVATIONS: Final = (
    "hidden_activation",
    "hidden_act",
    "activation_function",
    "ffn_activation",
    "dense_act_fn",
    "activation",
)
_ROTARY_SHARES: Final = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent")


def _settings(*spellings: tuple[str, ...], null_is_default: bool = False) -> tuple[Setting, ...]:
    return tuple(Setting(each[0], each, None, null_is_default) for each in spellings)


# -- the table --------------------------------------------------------------------------------------------------------

MODEL_TYPE: Final = Setting("model_type", ("model_type",), _model_type)

ACTIVATION: Final = Setting("hidden_act", _ACTIVATIONS, _activation, null_is_default=True)

SIZES: Final = _settings(
    ("hidden_size", "n_embd", "d_model", "model_dim", "embed_dim", "dim"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    ("decoder_attention_heads",),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num"),
    ("head_dim", "attention_head_dim", "kv_channels", "d_kv"),
    ("v_head_dim",),
    ("qk_nope_head_dim",),
    ("qk_rope_head_dim",),
    ("q_lora_rank",),
    ("kv_lora_rank",),
    ("swa_num_attention_heads",),
    ("swa_num_key_value_heads",),
    ("swa_head_dim",),
    ("index_n_heads", "indexer_n_heads"),
    ("index_head_dim", "indexer_head_dim"),
    ("linear_num_heads",),
    ("linear_head_dim",),
    ("linear_num_key_heads",),
    ("linear_num_value_heads",),
    ("linear_key_head_dim",),
    ("linear_value_head_dim",),
    ("state_size", "mamba_d_state", "ssm_state_size"),
    ("conv_kernel", "mamba_d_conv"),
    ("n_groups", "mamba_n_groups", "mamba_ngroups"),
    ("mamba_num_heads", "mamba_n_heads", "n_mamba_heads"),
    ("mamba_head_dim", "mamba_d_head", "mamba_headdim"),
    ("patch_size",),
    ("temporal_patch_size",),
    ("spatial_merge_size",),
    null_is_default=True,
)
"""Of attention and what takes its place. Where null or nothing stands, the size is computed from the others."""

FEED_FORWARD: Final = _settings(
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "mlp_dim", "encoder_ffn_dim"),
    ("decoder_ffn_dim",),
    ("moe_intermediate_size", "moe_hidden_size"),
    ("shared_expert_intermediate_size", "shared_intermediate_size"),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_top_k",
        "moe_topk",
        "top_k_experts",
        "num_selected_experts",
    ),
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    ("n_group",),
    ("topk_group",),
    null_is_default=True,
)

FORM: Final = (
    *_settings(
        ("norm_type", "layer_norm_type", "normalization_type"),
        ("rms_norm",),
        ("do_layer_norm_before",),
        ("apply_layernorm_1p",),
        ("use_qk_norm", "qk_layernorm", "qk_norm"),
        ("is_gated_act",),
        ("scale_attn_weights",),
        ("scale_attn_by_inverse_layer_idx",),
        ("scale_embedding",),
        ("use_parallel_residual", "parallel_attn"),
        ("new_decoder_architecture",),
        ("multi_query",),
        ("alibi",),
        ("position_embedding_type",),
        ("rotary_dim",),
        ("rope_interleave",),
        null_is_default=True,
    ),
    Setting("partial_rotary_factor", _ROTARY_SHARES, _rotary_share, null_is_default=True),
)
"""Kinds of norms, of positions, and of the way through a layer."""

STRUCTURE: Final = (*SIZES, *FEED_FORWARD, ACTIVATION, *FORM)

NUANCES: Final = (
    Setting("rope_theta", _THETAS, _rope_theta),
    Setting("rope_local_base_freq", ("rope_local_base_freq",), _local_theta),
    Setting("rope_scaling", ("rope_scaling", "rope_parameters"), _rope_scaling),
    Setting("original_max_position_embeddings", (), _trained_positions, null_is_default=True),
    Setting("sliding_window", ("sliding_window",), _window),
    Setting("max_window_layers", ("max_window_layers",), _window_layers),
    *_settings(
        ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"),
        ("layer_types",),
        ("no_rope_layers",),
        ("attention_chunk_size",),
        ("rms_norm_eps",),
        ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
        ("norm_eps", "norm_epsilon"),
        ("attn_logit_softcapping", "attention_logit_cap"),
        ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
        ("query_pre_attn_scalar",),
        ("window_size",),
        ("sliding_window_pattern",),
        ("attn_scale",),
        ("attention_multiplier",),
        ("residual_multiplier", "scale_depth"),
        ("embedding_multiplier", "scale_emb"),
        ("logits_scaling", "logit_scale"),
        *((f"{part}_multiplier",) for part in ("lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")),
        ("mlp_multipliers",),
        ("ssm_multipliers",),
        ("attention_bias", "qkv_bias", "use_qkv_bias"),
        ("mlp_bias",),
        ("norm_topk_prob",),
        ("routed_scaling_factor", "route_scale"),
        ("scoring_func",),
        ("topk_method",),
        ("time_step_limit",),
        ("image_size",),
    ),
)

OUTER: Final = (
    Setting("architectures", ("architectures",), _class),
    Setting("id2label", ("id2label",), _labels),
    *_settings(
        ("problem_type",),
        *((f"{kind}_token_id", f"{kind}_token_index") for kind in ("image", "video", "audio")),
        *((f"{kind}_token_id",) for kind in ("vision_start", "vision_end", "audio_start", "audio_end")),
        ("boi_token_index", "boi_token_id"),
        ("eoi_token_index", "eoi_token_id"),
        ("mm_tokens_per_image", "image_seq_length", "image_seq_len", "num_image_tokens"),
        ("vision_feature_layer",),
        ("vision_feature_select_strategy",),
        ("projector_hidden_act",),
        null_is_default=True,
    ),
)
"""Of the whole model rather than its parts: what the rows of a head mean, and where other modalities go."""

_IRRELEVANT: Final = re.compile(
    # Training.
    r"dropout|_drop\b|_pdrop$|drop_(rate|path)|droprate|layerdrop|initializ|(^|_)init_|_std$|_std_|loss|_coef|jitter|noise"
    r"|^mask_|mask_(time|feature)|^aux_|seq_aux|gradient|checkpointing|^ctc_|time_step_(min|max|floor)|rescale_prenorm"
    # Running.
    r"|^_|use_cache|cache_implementation|flash|kernel|fused|_impl$|attn_implementation|torchscript|^output_|return_dict"
    r"|chunk_size_feed_forward|pretraining_tp|_size_per_|^ep_size$|batch|^(torch_)?dtype$|_dtype$|residual_in_fp32"
    # Generation.
    r"|^(max|min)_(length|new_tokens)$|^do_sample$|beam|^temperature$|^(top|typical)_p$|^top_k$|_penalty$|no_repeat_ngram"
    r"|num_return_sequences|early_stopping|suppress|^forced_|remove_invalid|bad_words|exponential_decay|^prefix$"
    # Names, tokens, and counts of layers, which tensors show.
    r"|^(architectures|auto_map|model_type|problem_type|finetuning_task|language|name_or_path|pruned_\w+|task\w*|id2label"
    r"|label2id|num_labels|summary_\w+|is_composition|tie_\w+|vocab_size\w*|\w*vocab_size|\w*token_ids?|\w*token_index"
    r"|\w*version|\w*layers?|depth|n_layer\w*|num_(hidden_)?layers\w*)$"
)
"""Keys that speak only of training, running, generation and names."""

_COMPARED_OTHERWISE: Final = frozenset(
    key for setting in (MODEL_TYPE, *STRUCTURE, *NUANCES, *OUTER) for key in setting.spellings
) | {*_THETAS, "original_max_position_embeddings", "use_sliding_window"}


def others(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, words and switches of a part of a config that no setting above reads and that may change a result.

    Keys of training, running, generation and names are left out, and so are counts of layers, which tensors show.
    """
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, bool | int | float | str)
        and key not in _COMPARED_OTHERWISE
        and not _IRRELEVANT.search(key)
    }
