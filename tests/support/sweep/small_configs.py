"""Small configs of families that transformers knows: the class's defaults with every size made small.

Sizes go by their names, which hardly differ between families. `CHANGES` holds what no rule says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

LAYERS, TOWER_LAYERS = 6, 2
"""Layers of a language model, and of a tower beside it."""

VOCAB = 128
FIRST_PLACEHOLDER = 100
"""The ids from here on stand for images and so on; texts use those below."""

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 4, 2, 16

_EXACTLY = re.compile(
    r"(\w+_)?hidden_size(_global)?|d_model|n_embd|emb(ed)?_dim|embedding_(size|dim)|(\w+_)?projection_dim"
    r"|word_embed_proj_dim|(in|out)put_embedding_size|hidden_dim|lru_width|vision_output_dim|projector_(in|out)put_dim"
    r"|adapter_(in|out)_dim|adapter_input_size|(pronunciation|shape)_embed_dim|codebook_dim|output_dim|text_hidden_size"
    r"|vector_quantization_hidden_dimension"
)
"""Widths, which must be one where models are joined."""

_MAMBA = {"mamba_n_heads": 8, "mamba_num_heads": 8, "n_mamba_heads": 8, "mamba_d_ssm": 2 * _HIDDEN} | dict.fromkeys(
    ("mamba_d_head", "mamba_headdim", "mamba_head_dim"), _HEAD_DIM
)
"""Heads of state spaces, which are twice as wide as the model."""

_UNLESS_GIVEN = {"head_dim": _HIDDEN // _HEADS, "num_key_value_heads": _KV_HEADS, "num_experts_per_tok": 2}
"""Instead of None."""

_AT_MOST = {
    r"(task_)?type_vocab_size|vision_feature_layer": 2,
    r"(\w+_)?vocab_size(_per_layer_input|_base)?|codebook_size|num_embeddings|encoder_hash_byte_group_vocab": VOCAB,
    r"hidden_size_per_layer_input|laurel_rank|gated_norm_rank|o_lora_rank|hc_lowrank|adapter_rank|d_rel|ple_embed_dim"
    r"|mamba_d_state|ssm_state_size|state_size": 16,
    r"(shared_experts?|moe_shared_expert|moe|shared|dense|expert|alignment)_intermediate_size|intermediate_size(_mlp)?|\w*ffn_dim"
    r"|(expert_)?ffn_hidden_size|d_ff|dff|dim_ff|d_inner|mlp_dim|feed_forward_size|prompt_mid_dim": 64,
    r"n_heads?|(\w+_)?num_attention_heads(_per_layer)?|num_heads|(en|de)coder_attention_heads|attention_heads"
    r"|num_(en|de)coder_attention_heads|linear_num_(value_)?heads|\w+_n_heads": _HEADS,
    r"(\w+_)?num_key_value_heads|kv_n_heads|num_kv_heads|linear_num_key_heads|num_query_groups": _KV_HEADS,
    r"(\w+_)?head_dim|dim_head|attention_head_size|d_head|d_kv|kv_channels|query_pre_attn_scalar|rotary_dim"
    r"|(kv|q)_lora_rank": _HEAD_DIM,
    r"(n|num)_(routed_|local_)?experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|index_topk_blocks|n_groups|mamba_n_groups|o_groups": 2,
    r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group": 1,
    r"mamba_dt_rank|time_step_rank|patch_size|index_topk": 8,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_(source|target)_positions"
    r"|original_max_position_embeddings|context_length": 256,
    r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size|keep_window_size|block_size"
    r"|index_block_size": 8,
    r"image_size|crop_size|out_channels|base_channels|num_filters|upsample_groups|output_channels|num_mel_bins": 32,
}

_LAYER_COUNT = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|depth"
    r"|resampler_depth|conf_num_hidden_layers|num_global_layers"
)
_LAYER_NUMBERS = re.compile(r"\w*(index(es)?|indices|idxs|_layers|layer_ids|feature_layers?)")
_TOWER = re.compile(
    r"vision|visual|audio|image|video|codec|vq|qformer|sam_|high_res|perceiver|resampler|tokenizer|2wav"
    r"|adapt[eo]r|encoder_config|protein|projector"
)
_TOKEN = re.compile(r"\w*(token_id|token_ids|token_index|_id_list)|image_token|boi_token|eoi_token")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_NOT_SIZES = frozenset(
    {"architectures", "id2label", "label2id", "model_type", "per_layer_config", "transformers_version"}
)

_ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 16, "compress_ratio": 4}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}

_HYBRID = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
_LATENT = {
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_TWICE_AS_WIDE = {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HIDDEN // _HEADS}
_SECTIONS = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 4]},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_PLACEHOLDER}},
    "cohere_compass": {"text_config.rope_parameters": _ROPES},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", *["sparse"] * 5]},
    "diffusion_gemma": {f"text_config.{key}": value for key, value in _EXPERTS.items()},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {
        "vision_config.num_hidden_layers": 42,
        **{f"text_config.swa_{key}": value for key, value in _LATENT.items()},
    },
    "dots3_note_text": {f"swa_{key}": value for key, value in _LATENT.items()},
    "emu3": {"vocabulary_map": {"<|extra_200|>": FIRST_PLACEHOLDER, "<image>": FIRST_PLACEHOLDER + 1}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 2, 1]},
    "evolla": {"resampler_depth": 2},
    "fun_asr_nano": {"adaptor_config.intermediate_size": _HIDDEN // 4},
    "gemma3n_text": {
        "layer_types": _ALTERNATING,
        "num_kv_shared_layers": 3,
        "intermediate_size": [64] * 6,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_unified_assistant": {"text_config.layer_types": _ALTERNATING, "text_config.num_kv_shared_layers": 3},
    "glm5_next": {"text_config.index_kpool": 4},
    "glmga": _SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "2/4",
        "spatial_target_layers": [2],
    },
    "idefics": {"cross_layer_interval": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_vl": {
        "text_config.layer_types": ["conv", "conv", "full_attention"] * 2,
        "text_config.full_attn_idxs": None,
    },
    "llama4": {"text_config.interleave_moe_layer_step": 2},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"expand": 1},
    "muse_spark": {
        "audio_config.hidden_sizes": [16] * 4,
        "audio_config.num_hidden_layers": 4,
    },
    "nemo_speechlm": {"text_config.layers_block_type": _HYBRID},
    "nemotron_h": {"layers_block_type": _HYBRID},
    "nemotron_h_omni": {"text_config.layers_block_type": _HYBRID},
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm_ocr": _SECTIONS,
    "paddleocr_vl": _SECTIONS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "qwen2_5_omni_thinker": _SECTIONS,
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": _HIDDEN},
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 64,
    },
    "qwen4_exp": {f"text_config.indexer_{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": {f"indexer_{key}": value for key, value in _INDEXER.items()},
    "step3p7": {"text_config.sliding_window": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48]},
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config.{key}": value
        for kind in ("acoustic", "semantic")
        for key, value in (("num_filters", 2), ("depths", [1] * 5), ("downsampling_ratios", [2, 2, 4, 5]))
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 2, **_TWICE_AS_WIDE},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
        **_TWICE_AS_WIDE,
    },
}
"""By family, what is given to its config's class beside what the rules say; dots lead into sub-configs."""


def small_config(model_type: str) -> Any:
    """The family's config, small.

    Raises:
        Exception: whatever its class says of sizes that do not go together.
    """
    made = CONFIG_MAPPING[model_type]
    values = _shrunk(made().to_dict(), {}, is_tower=False)
    for path, value in CHANGES.get(model_type, {}).items():
        *parts, key = path.split(".")
        part = values
        for each in parts:
            part = part.setdefault(each, {})
        part[key] = value
    return made(**values)


def _shrunk(values: Mapping[Any, Any], placeholders: dict[str, int], *, is_tower: bool, is_root: bool = True) -> Any:
    depth = TOWER_LAYERS if is_tower else LAYERS
    counts = [value for key, value in values.items() if _LAYER_COUNT.fullmatch(str(key)) and isinstance(value, int)]
    result: dict[Any, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            result[key] = value
        elif key in _NOT_SIZES and not (key == "model_type" and not is_root):
            continue
        elif isinstance(value, Mapping):
            result[key] = (
                _shrunk_rope(value)
                if key.startswith("rope_")
                else _shrunk(value, placeholders, is_tower=is_tower or bool(_TOWER.search(key)), is_root=False)
            )
        elif isinstance(value, list | tuple):
            if len(value) not in counts:  # what is listed for each layer follows from the rest
                result[key] = [_shrunk_value(key, each, depth, placeholders) for each in value]
                if _LAYER_NUMBERS.fullmatch(key):
                    result[key] = sorted(set(result[key]))
        else:
            result[key] = _shrunk_value(key, value, depth, placeholders)
    if "kv_lora_rank" in result:
        result["num_key_value_heads"] = _HEADS  # latent attention has one for each
    return result


def _shrunk_value(key: str, value: Any, depth: int, placeholders: dict[str, int]) -> Any:
    if value is None:
        return _UNLESS_GIVEN.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key in _MAMBA:
        return _MAMBA[key]
    if _TOKEN.fullmatch(key):
        if key in _SPECIAL or value < len(_SPECIAL):
            return _SPECIAL.get(key, value)
        return placeholders.setdefault(key, FIRST_PLACEHOLDER + len(placeholders))
    if _LAYER_COUNT.fullmatch(key):
        return depth if depth == LAYERS else min(value, depth)
    if _LAYER_NUMBERS.fullmatch(key):
        return max(min(value, depth - 1), -depth)
    for pattern, most in _AT_MOST.items():
        if re.fullmatch(pattern, key):
            return min(value, most)
    return _HIDDEN if _EXACTLY.fullmatch(key) and value else value


def _shrunk_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rope's settings; sections, of which each has some of a head's frequencies, are of the small head's."""
    result: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, Mapping):
            result[key] = _shrunk_rope(value)
        elif key.endswith("_section"):
            result[key] = _shrunk_sections(value, int(_HEAD_DIM // 2 * rope.get("partial_rotary_factor", 1.0)))
        else:
            result[key] = _shrunk_value(key, value, LAYERS, {})
    return result


def _shrunk_sections(sections: Sequence[int], total: int) -> list[int]:
    """As many sections in like proportions, of a given sum."""
    small = [each * total // sum(sections) for each in sections]
    return [each + (number < total - sum(small)) for number, each in enumerate(small)]
