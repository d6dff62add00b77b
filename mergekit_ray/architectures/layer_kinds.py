"""Layers whose kind follows from their index, as configs and the code of their families have it.

Gemma 2 attends to a window in every other layer, Qwen3-Next to everything in every fourth, DeepSeek's first layers are
dense. When layers are cut anew their kinds go with them, and the output's config must say each: by a list where the
family reads one, by other numbers where they are enough.

One table, `RULES`: how a config gives the kinds, what each family has where its config says nothing, and how to say it.
Sources: the config and model classes of transformers 5; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from mergekit_ray.architectures.layer_rules import (
    FULL,
    INDEXED,
    LINEAR,
    SLIDING,
    Config,
    Kind,
    Rule,
    below,
    each,
    every,
    family_of,
    indices_rule,
    items,
    jamba_rule,
    leading_rule,
    led,
    list_rule,
    nested,
    number,
    period_rule,
    trailing_rule,
    where,
)

_GEMMA4 = ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text")
"""Their last layer always has full attention, whatever is listed."""

_WINDOW_PERIODS = {
    **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe"), 4),
    **dict.fromkeys(("gemma3_text", "t5gemma2_text", "t5gemma2_decoder", *_GEMMA4), 6),
}
"""Layers from one with full attention to the next."""

_window = every(_WINDOW_PERIODS, "sliding_window_pattern")

_WINDOWLESS = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen2_5_omni_text", "qwen2_5_omni_talker"), 28),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), 80),
    **dict.fromkeys(("deepseek_ocr2_encoder", "qwen3_omni_moe_talker_code_predictor"), 28),
    "dots1": 62,
}
"""Leading layers without a window."""

_DENSE = {
    **dict.fromkeys(("axk1", "axk2", "exaone_moe", "kimi_linear", "mistral_large4_text", "unlimited_ocr_text"), 1),
    **dict.fromkeys(("ernie4_5_vl_moe_text", "glm4_moe_lite", "hy_v3", "hy_v4", "laguna", "mimo_v2_flash"), 1),
    **dict.fromkeys(("beam", "deepseek_v32", "glm5_next_text", "glm_moe_dsa"), 3),
    "bailing_hybrid": 2,
    "cohere2_moe": 0,
}
"""Leading layers without experts."""


def rules_of(config: Config) -> list[Rule]:
    """The rules of a config's family, and all others whose keys it has, in the order in which they are applied."""
    family = family_of(config)
    known = {rule.key for rule in RULES if family in rule.families}
    return [
        rule
        for rule in RULES
        if family in rule.families
        or (rule.key not in known and any(config.get(key) not in (None, False) for key in rule.triggers))
    ]


def _is_dense(config: Config, index: int, _: int) -> bool:
    """Of the Mixtures of Experts after Qwen's."""
    listed = config.get("mlp_only_layers")
    if listed is None and config.get("model_type") == "flint":
        listed = [0, 1]
    step = max(number(config, "decoder_sparse_step", 1), 1)
    return (index + 1) % step != 0 or (isinstance(listed, list) and index in listed)


def _say_dense(config: Config, kinds: list[Any]) -> dict[str, Any]:
    step = {"decoder_sparse_step": 1} if "decoder_sparse_step" in config else {}
    return {"mlp_only_layers": where(kinds), **step}


def _is_ernie_sparse(config: Config, index: int, count: int) -> bool:
    first, last = number(config, "moe_layer_start_index", 1), number(config, "moe_layer_end_index", -1)
    is_nth = (index + 1) % max(number(config, "moe_layer_interval", 1), 1) == 0
    return is_nth and first <= index <= (count - 1 if last == -1 else last)


def _say_ernie(_: Config, kinds: list[Any]) -> dict[str, Any]:
    found = where(kinds)
    if not found:
        return {"moe_layer_start_index": len(kinds)}
    gaps = {after - before for before, after in pairwise(found)}
    ends = {"moe_layer_start_index": found[0], "moe_layer_end_index": found[-1]}
    return {**ends, "moe_layer_interval": min(gaps, default=found[0] + 1)}


def _llama4_moe(config: Config, index: int, _: int) -> bool:
    listed = config.get("moe_layers")
    if isinstance(listed, list):
        return index in listed
    return (index + 1) % max(number(config, "interleave_moe_layer_step", 1), 1) == 0


def _qwen_window(config: Config, index: int, _: int) -> str:
    is_used = bool(config.get("use_sliding_window", config.get("model_type") == "dots1"))
    is_used = is_used and config.get("sliding_window", True) is not None
    if config.get("model_type") == "qwen2_moe":
        return SLIDING if is_used and index % 2 == 0 and index < number(config, "max_window_layers", 28) else FULL
    first = number(config, "max_window_layers", _WINDOWLESS.get(family_of(config), 0))
    return SLIDING if is_used and index >= first else FULL


def _with_rope(config: Config, index: int, _: int) -> int:
    listed = items(config, "no_rope_layers")
    period = max(number(config, "no_rope_layer_interval", 4), 1)
    return listed[index] if index < len(listed) else int((index + 1) % period != 0)


def _llama4(config: Config, index: int, count: int) -> str:
    return "chunked_attention" if _with_rope(config, index, count) else FULL


def _smollm3(config: Config, index: int, count: int) -> str:
    is_used = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return SLIDING if is_used and not _with_rope(config, index, count) else FULL


def _kimi(config: Config, index: int, _: int) -> str:
    full = nested(config, "linear_attn_config", "full_attn_layers")
    if full or nested(config, "linear_attn_config", "kda_layers"):
        return FULL if index + 1 in full else LINEAR
    return FULL if index > 0 and index % 4 == 0 else LINEAR


def _say_kimi(config: Config, kinds: list[Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"layer_types": kinds} if config.get("layer_types") is not None else {}
    if isinstance(part := config.get("linear_attn_config"), Mapping) and "kda_layers" in part:
        places = {FULL: "full_attn_layers", LINEAR: "kda_layers"}
        ones = {key: [i + 1 for i, kind in enumerate(kinds) if kind == name] for name, key in places.items()}
        return {**told, "linear_attn_config": {**part, **ones}}
    return {"layer_types": kinds}


def _exaone(config: Config, index: int, count: int) -> str:
    return str(_window(config, index, count)) if config.get("sliding_window", True) is not None else FULL


def _from_last(nth: Any, other: Any) -> Kind:
    return lambda _, index, count: nth if (count - 1 - index) % 4 == 0 else other


def _muse_theta(config: Config, index: int, count: int) -> Any:
    ropes = config.get("rope_parameters")
    default = 500_000.0 if config.get("model_type") == "muse_spark_text" else 10_000.0
    theta = ropes.get("rope_theta", default) if isinstance(ropes, Mapping) else default
    return _from_last(0, theta)(config, index, count)


def _cohere2_moe(config: Config, index: int, count: int) -> str:
    dense = number(config, "first_k_dense_replace", 0)
    if index < dense:
        return str(every(1, "prefix_dense_sliding_window_pattern")(config, index, count))
    return str(_window(config, index - dense, count))


def _inkling(config: Config, index: int, _: int) -> str:
    listed = config.get("local_layer_ids")
    is_local = index in listed if isinstance(listed, list) else (index + 1) % 6 != 0
    return "hybrid_sliding" if is_local else "hybrid"


def _dots3(config: Config, index: int, _: int) -> str:
    full = FULL if config.get("use_dsa") is False else INDEXED
    return full if config.get("use_sliding_window") is False or index < 2 or index % 4 == 1 else SLIDING


def _dots3_moe(config: Config, index: int, _: int) -> str:
    listed = items(config, "moe_layer_freq")
    is_nth = listed[index] if index < len(listed) else index % max(number(config, "moe_layer_freq", 1), 1) == 0
    return "sparse" if index >= number(config, "first_k_dense_replace", 1) and is_nth else "dense"


def _deepseek_v4(config: Config, index: int, _: int) -> str:
    ratios = {0: SLIDING, 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    listed = items(config, "compress_ratios")
    ratio = listed[index] if index < len(listed) else 4 if index > 1 and index % 2 else 128
    return ratios.get(ratio, SLIDING) if isinstance(ratio, int) else SLIDING


def _minimax_m3(config: Config, index: int, _: int) -> str:
    listed = nested(config, "sparse_attention_config", "sparse_attention_freq")
    return "minimax_m3_sparse" if index < len(listed) and listed[index] else FULL


def _minimax_m3_moe(config: Config, index: int, _: int) -> str:
    listed = items(config, "moe_layer_freq")
    return "dense" if index < len(listed) and not listed[index] else "sparse"


def _step3(config: Config, index: int, _: int) -> str:
    listed = config.get("moe_layers_enum")
    if isinstance(listed, str):
        listed = [int(item) for item in listed.split(",") if item.strip().isdecimal()]
    return "sparse" if (index in listed if isinstance(listed, list) else index > 2) else "dense"


def _indexer(config: Config, index: int, _: int) -> str:
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, str) and index < len(pattern):
        return "full" if pattern[index] == "F" else "shared"
    period, offset = max(number(config, "index_topk_freq", 1), 1), number(config, "index_skip_topk_offset", 2)
    return "full" if max(index - offset + 1, 0) % period == 0 else "shared"


def _zamba(config: Config, index: int, _: int) -> str:
    period, offset = max(number(config, "attn_layer_period", 6), 1), number(config, "attn_layer_offset", 4)
    return "hybrid" if (index == 2 if index < 3 else (index - 3) % period == offset) else LINEAR


def _recurrent_gemma(config: Config, index: int, _: int) -> str:
    period = items(config, "block_types") or ("recurrent", "recurrent", "attention")
    return str(period[index % len(period)])


def _gpt_neo(config: Config, count: int) -> list[Any]:
    found: list[Any] = []
    for item in items(config, "attention_types") or [[["global", "local"], count]]:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int):
            found += item[0] * min(item[1], count)
    return found[:count]


def _gemma4(config: Config, count: int) -> list[Any]:
    listed = items(config, "layer_types")
    kinds = list(listed[:count]) if len(listed) >= count else each(_window)(config, count)
    return [*kinds[:-1], FULL] if kinds else []


def _olmo_hybrid(config: Config, index: int, count: int) -> str:
    return str(every(4, other=LINEAR, last=FULL if count < 4 else None)(config, index, count))


def _lfm3(_: Config, index: int, __: int) -> str:
    return ("conv" if index == 0 else SLIDING, "conv", FULL, "conv")[index % 4]


def _sparsity(_: Config, index: int, count: int) -> float:
    return 0.95 if index < 10 < count else 0.0


def _places(_: Config, count: int) -> list[int]:
    return list(range(count))


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


RULES = (
    # Numbers and indices.
    leading_rule("first_k_dense_replace", {"deepseek_v3": 3, "glm4_moe": 1, "glm4v_moe_text": 1}, "mlp_layer_types"),
    leading_rule("num_dense_layers", {"afmoe": 1, "lfm2_moe": 2}),
    leading_rule("num_hash_layers", {}, "mlp_layer_types"),
    leading_rule("dense_mlp_idx", {}, "mlp_layer_types"),
    leading_rule("max_window_layers", {}, "layer_types", needs="use_sliding_window"),
    trailing_rule("num_kv_shared_layers"),
    indices_rule("cross_attention_layers"),
    indices_rule("attn_layer_indices", "layer_types", "layers_block_type"),
    indices_rule("full_attn_idxs", "layer_types"),
    indices_rule("local_layer_ids", "layer_types"),
    indices_rule("hybrid_layer_ids", "layers_block_type"),
    indices_rule("rope_scaling_layers"),
    Rule(
        "mlp_only_layers",
        each(_is_dense),
        _say_dense,
        _named("flint"),
        ("mlp_only_layers", "decoder_sparse_step"),
    ),
    Rule(
        "moe_layers",
        each(_llama4_moe),
        lambda _, kinds: {"moe_layers": where(kinds)},
        _named("llama4_text"),
        ("moe_layers",),
    ),
    Rule("moe_layer_interval", each(_is_ernie_sparse), _say_ernie, _named("ernie4_5_moe")),
    jamba_rule("attn_layer", 8, 4),
    jamba_rule("expert_layer", 2, 1),
    # Attention.
    list_rule("layer_types", "gemma2 gpt_oss vaultgemma t5_gemma_module", every(2)),
    list_rule("layer_types", "ultrabert", every(3)),
    list_rule("layer_types", "olmo3", every(4)),
    list_rule("layer_types", "gemma3n_text kolibri1", every(5)),
    list_rule("layer_types", "beam neomme", every(6, last=FULL)),
    list_rule("layer_types", "cwm granite_swa granitemoe_swa", every(4, first=0)),
    list_rule("layer_types", "afmoe", every(4, "global_attn_every_n_layers")),
    list_rule("layer_types", "modernbert modernbert-decoder", every(3, "global_attn_every_n_layers", first=0)),
    list_rule("layer_types", "cohere2 gemma3_text t5gemma2_text t5gemma2_decoder", _window),
    list_rule("layer_types", "exaone4 exaone_moe", _exaone),
    list_rule("layer_types", "cohere2_moe", _cohere2_moe),
    Rule("layer_types", _gemma4, lambda _, kinds: {"layer_types": kinds}, _named(*_GEMMA4)),
    list_rule("layer_types", _WINDOWLESS, _qwen_window),
    list_rule("layer_types", "mimo_v2_flash", led(FULL, every(6))),
    list_rule("layer_types", "flint", led(FULL, every(4, first=1, last=FULL))),
    list_rule("layer_types", "dots3_note dots3_note_text", _dots3),
    list_rule("layer_types", "inkling_text", _inkling),
    list_rule("layer_types", "inkling2_text", every(6, nth="hybrid", other="hybrid_sliding")),
    list_rule("layer_types", "muse_glimmer_text muse_spark_text", _from_last(FULL, SLIDING)),
    list_rule("layer_rope_theta", "muse_glimmer_text muse_spark_text", _muse_theta),
    list_rule("layer_types", "deepseek_v4", _deepseek_v4),
    list_rule("layer_types", "minimax_m3_vl_text", _minimax_m3),
    list_rule("indexer_types", "glm5_next_text glm_moe_dsa mistral_large4_text", _indexer),
    list_rule("indexer_types", "hy_v4", led("full", every(4, nth="full", other="shared", first=1))),
    list_rule("no_rope_layers", "llama4_text mistral_large4_text smollm3", _with_rope),
    list_rule("layer_types", "llama4_text", _llama4),
    list_rule("layer_types", "smollm3", _smollm3),
    # Attention in some layers, a recurrence or a convolution in others.
    list_rule(
        "layer_types", "qwen3_next qwen3_5_text qwen3_5_moe_text", every(4, "full_attention_interval", other=LINEAR)
    ),
    list_rule("layer_types", "qwen4_exp_text", every(4, "full_attention_interval", INDEXED, LINEAR)),
    list_rule("layer_types", "glm5_next_text", every(4, "", INDEXED, LINEAR)),
    list_rule("layer_types", "olmo_hybrid", _olmo_hybrid),
    list_rule("layer_types", "bailing_hybrid", every(6, "layer_group_size", other=LINEAR)),
    list_rule("layer_types", "minimax", every(2, nth=LINEAR, other=FULL)),
    list_rule("layer_types", "lfm3", _lfm3),
    Rule("layer_types", list_rule("layer_types", "", _kimi).kinds, _say_kimi, _named("kimi_linear")),
    list_rule("layers_block_type", "zamba", _zamba),
    Rule("block_types", each(_recurrent_gemma), lambda _, kinds: {"block_types": kinds}, _named("recurrent_gemma")),
    Rule("attention_types", _gpt_neo, lambda _, kinds: {"attention_types": [[kinds, 1]]}, _named("gpt_neo")),
    # Experts in some layers.
    list_rule("mlp_layer_types", _DENSE, below("first_k_dense_replace", _DENSE, "dense", "sparse")),
    list_rule("mlp_layer_types", "inkling_text", below("dense_mlp_idx", 0, "dense", "sparse")),
    list_rule("mlp_layer_types", "deepseek_v4", below("num_hash_layers", 3, "hash_moe", "moe")),
    list_rule("mlp_layer_types", "dots3_note dots3_note_text", _dots3_moe),
    list_rule("mlp_layer_types", "minimax_m3_vl_text", _minimax_m3_moe),
    list_rule("mlp_layer_types", "step3p5", _step3),
    list_rule("activation_sparsity_pattern", "gemma3n_text", _sparsity),
    # GPT-2 may divide its attention by the number of the layer.
    Rule("scale_attn_by_inverse_layer_idx", _places, triggers=("scale_attn_by_inverse_layer_idx",)),
    # Periods that nothing else in the config reveals, or whose family is not known here.
    period_rule("n_layers_per_attn_res_block", families={"inkling2_text": 6}),
    period_rule("sliding_window_pattern", "layer_types"),
    period_rule("global_attn_every_n_layers", "layer_types"),
    period_rule("full_attention_interval", "layer_types"),
    period_rule("layer_group_size", "layer_types"),
    period_rule("no_rope_layer_interval", "no_rope_layers"),
    period_rule("attn_layer_period", "layers_block_type", "layer_types"),
    period_rule("expert_layer_period"),
    period_rule("moe_layer_freq", "mlp_layer_types"),
    period_rule("moe_layer_interval"),
    period_rule("interleave_moe_layer_step", "moe_layers"),
)
"""What holds for some layers only. Numbers go first: where they are enough, no list is written."""
