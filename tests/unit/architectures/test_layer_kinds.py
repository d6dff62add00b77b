"""The rules of layers' kinds against transformers' own config classes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_ray.architectures.layer_kinds import RULES, rules_of

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types", "layer_rope_theta")
LISTS += ("activation_sparsity_pattern",)
COUNTS = (13, 17)

ELSEWHERE = {"bamba", "jamba", "recurrent_gemma", "zamba", "lfm2", "granitemoehybrid"}
"""Families whose ``layer_types`` is made from what has a rule under another key, or has to be in the file."""


def made(family: str, **keys: Any) -> Any:
    """A config by its class, None if it cannot have so many layers."""
    try:
        return CONFIG_MAPPING[family](**keys)
    except Exception:  # noqa: BLE001 - of every sort: some classes want to be told more
        return None


def kinds(family: str, key: str, **config: Any) -> list[Any]:
    """What the rules say."""
    config = {"model_type": family, **config}
    found = [rule for rule in rules_of(config) if rule.key == key]
    assert len(found) == 1, f"{len(found)} rules for {key} of {family}"
    return found[0].kinds(config, config["num_hidden_layers"])


@pytest.mark.parametrize("count", COUNTS)
def test_what_every_family_has_where_its_config_says_nothing(count: int) -> None:
    """A new family whose layers differ by their index needs a rule in `RULES`."""
    seen = 0
    for family in CONFIG_MAPPING:
        config = made(family, num_hidden_layers=count)
        if config is None or "vision" in family:
            continue
        known = {rule.key for rule in rules_of({"model_type": family})}
        for key in LISTS:
            theirs = getattr(config, key, None)
            if not isinstance(theirs, list) or len(theirs) != count:
                continue
            if key in known:
                assert kinds(family, key, num_hidden_layers=count) == theirs, (family, key)
                seen += 1
            elif family not in ELSEWHERE:
                assert len(set(theirs)) == 1, f"no rule says {key} of {family}: {theirs}"
    assert seen > 20


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma3_text", "layer_types", {"sliding_window_pattern": 4}),
    ("cohere2", "layer_types", {"sliding_window_pattern": 3}),
    ("cohere2_moe", "layer_types", {"first_k_dense_replace": 2, "sliding_window_pattern": 3}),
    ("cohere2_moe", "mlp_layer_types", {"first_k_dense_replace": 2}),
    ("exaone4", "layer_types", {"sliding_window_pattern": 3}),
    ("exaone_moe", "mlp_layer_types", {"first_k_dense_replace": 4}),
    ("afmoe", "layer_types", {"global_attn_every_n_layers": 3}),
    ("modernbert", "layer_types", {"global_attn_every_n_layers": 4}),
    ("embedding_gemma2_text", "layer_types", {"sliding_window_pattern": 5}),
    ("gemma4_text", "layer_types", {"layer_types": ["sliding_attention"] * 12}),
    ("qwen2", "layer_types", {"use_sliding_window": True, "max_window_layers": 4}),
    ("qwen3", "layer_types", {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": None}),
    ("qwen2_moe", "layer_types", {"use_sliding_window": True, "max_window_layers": 7}),
    ("dots1", "layer_types", {"max_window_layers": 7}),
    ("qwen3_next", "layer_types", {"full_attention_interval": 3}),
    ("qwen3_5_text", "layer_types", {"full_attention_interval": 5}),
    ("bailing_hybrid", "layer_types", {"layer_group_size": 4}),
    ("inkling_text", "layer_types", {"local_layer_ids": [1, 2, 5]}),
    ("inkling_text", "mlp_layer_types", {"dense_mlp_idx": 3}),
    ("smollm3", "no_rope_layers", {"no_rope_layer_interval": 3}),
    ("smollm3", "layer_types", {"use_sliding_window": True, "sliding_window": 8}),
    ("llama4_text", "no_rope_layers", {"no_rope_layers": [], "no_rope_layer_interval": 5}),
    ("llama4_text", "layer_types", {"no_rope_layers": [1, 0] * 6}),
    (
        "kimi_linear",
        "layer_types",
        {"linear_attn_config": {"full_attn_layers": [2, 7, 12], "kda_layers": [1, 3, 4, 5, 6, 8, 9, 10, 11]}},
    ),
    ("kimi_linear", "mlp_layer_types", {"first_k_dense_replace": 2}),
    ("axk1", "mlp_layer_types", {"first_k_dense_replace": 3}),
    ("deepseek_v4", "layer_types", {"compress_ratios": [0, 0, 4, 128] * 3}),
    ("deepseek_v4", "mlp_layer_types", {"num_hash_layers": 5}),
    ("glm_moe_dsa", "indexer_types", {"index_topk_freq": 3, "index_skip_topk_offset": 4}),
    ("glm_moe_dsa", "indexer_types", {"index_topk_pattern": "FSSFFSSSFFSF"}),
    ("minimax_m3_vl_text", "layer_types", {"sparse_attention_config": {"sparse_attention_freq": [0, 1, 1] * 4}}),
    ("minimax_m3_vl_text", "mlp_layer_types", {"moe_layer_freq": [0, 0, 1] * 4}),
    ("step3p5", "mlp_layer_types", {"moe_layers_enum": "1,4,7"}),
    ("zamba", "layers_block_type", {"attn_layer_period": 4, "attn_layer_offset": 1}),
]


@pytest.mark.parametrize(("family", "key", "keys"), VARIANTS)
def test_what_keys_of_the_config_change(family: str, key: str, keys: dict[str, Any]) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {family}")
    told = {"num_hidden_layers": 12, **keys}
    assert kinds(family, key, **told) == getattr(CONFIG_MAPPING[family](**told), key)


def test_periods_and_offsets_of_jamba() -> None:
    told = {"num_hidden_layers": 12, "attn_layer_period": 5, "attn_layer_offset": 3, "expert_layer_period": 3}
    config = CONFIG_MAPPING["jamba"](**told)
    assert kinds("jamba", "attn_layer_period", **told) == [kind == "attention" for kind in config.layers_block_type]
    assert kinds("jamba", "expert_layer_period", **told) == [count > 1 for count in config.layers_num_experts]


def test_cycles_of_recurrent_gemma_and_gpt_neo() -> None:
    config = CONFIG_MAPPING["recurrent_gemma"](num_hidden_layers=7)
    found = kinds("recurrent_gemma", "block_types", num_hidden_layers=7)
    assert [kind == "attention" for kind in found] == [k != "linear_attention" for k in config.layers_block_type]
    types = [[["global", "local"], 2], [["local"], 3]]
    config = CONFIG_MAPPING["gpt_neo"](num_layers=7, attention_types=types)
    found = kinds("gpt_neo", "attention_types", num_hidden_layers=7, attention_types=types)
    assert found == config.attention_layers


@pytest.mark.parametrize("family", sorted({family for rule in RULES for family in rule.families}))
def test_numbers_that_are_missing_are_those_of_the_class(family: str) -> None:
    config = made(family)
    if config is None:
        pytest.skip(f"this transformers makes no {family} without being told more")
    for rule in rules_of({"model_type": family}):
        if isinstance(default := getattr(config, rule.key, None), int):
            told = {"model_type": family, rule.key: default}
            assert rule.kinds({"model_type": family}, 40) == rule.kinds(told, 40), rule.key
