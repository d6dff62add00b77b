"""The output's config.json."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.architectures.layer_kinds import RULES
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.output_config import output_config


def adapted(donor: dict[str, Any], **changes: Any) -> dict[str, Any]:
    before = copy.deepcopy(donor)
    unchanged: dict[str, Any] = dict.fromkeys(("layers", "main", "dtype", "tied", "vocab_size"))
    result = output_config(donor, **{"stacks": {}, **unchanged, **changes})
    assert donor == before, "the donor's config is not touched"
    return result


def cut(config: dict[str, Any], indices: Sequence[int]) -> list[tuple[dict[str, Any], int]]:
    return [(config, i) for i in indices]


def test_nothing_to_change() -> None:
    donor = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "dtype": "float16"}
    assert adapted(donor) == donor


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks", "layers"])
def test_layer_counts_under_every_name(key: str) -> None:
    assert adapted({key: 2}, layers=cut({key: 2}, [0, 1, 1])) == {key: 3}


def test_all_names_of_the_layer_count_agree() -> None:
    donor = {"num_hidden_layers": 2, "n_layer": 2}
    assert adapted(donor, layers=cut(donor, [0])) == {"num_hidden_layers": 1, "n_layer": 1}


@pytest.mark.parametrize(
    ("stack", "donor", "changed"),
    [
        ("model.decoder.layers", {"encoder_layers": 3, "decoder_layers": 2, "num_hidden_layers": 3}, "decoder_layers"),
        ("model.encoder.layers", {"encoder_layers": 2, "decoder_layers": 3}, "encoder_layers"),
        ("encoder.block", {"num_layers": 2, "num_decoder_layers": 3}, "num_layers"),
        ("decoder.block", {"num_layers": 3, "num_decoder_layers": 2}, "num_decoder_layers"),
        ("bert.encoder.layer", {"num_hidden_layers": 2}, "num_hidden_layers"),
    ],
)
def test_encoder_and_decoder_are_counted_apart(stack: str, donor: dict[str, Any], changed: str) -> None:
    stacks = {"model.encoder.layers": 3, "model.decoder.layers": 3, stack: 2}
    assert adapted(donor, stacks=stacks, main=stack, layers=cut(donor, [0, 1, 1])) == {**donor, changed: 3}


def test_a_decoder_by_itself_takes_all_names_of_the_count() -> None:
    donor = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    main = "model.decoder.layers"
    result = adapted(donor, stacks={main: 2}, main=main, layers=cut(donor, [0, 1, 1]))
    assert result == dict.fromkeys(donor, 3)


def test_a_list_may_be_all_that_counts_the_layers() -> None:
    donor: dict[str, Any] = {"layers_block_type": ["mamba", "moe"]}
    expected: dict[str, Any] = {"layers_block_type": ["mamba", "moe", "moe"]}
    stack: dict[str, Any] = {"stacks": {"model.layers": 2}, "main": "model.layers"}
    assert adapted(donor, **stack, layers=cut(donor, [0, 1, 1])) == expected
    donor, layers = {"text_config": donor}, cut({"text_config": donor}, [0, 1, 1])
    assert adapted(donor, **stack, layers=layers) == {"text_config": {**expected, "num_hidden_layers": 3}}


def test_a_scale_that_is_divided_by_the_depth_stays_what_it_is_for_each_layer() -> None:
    donor = {"num_hidden_layers": 4, "scale_depth": 1.4}
    result = adapted(donor, layers=cut(donor, [0, 1, 2, 3, 1, 2, 3, 2, 3]))
    assert result["scale_depth"] / 9**0.5 == pytest.approx(1.4 / 4**0.5)


def test_lists_per_layer_are_cut_like_the_layers() -> None:
    donor = {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "full", "linear"],
        "no_rope_layers": [1, 1, 1, 0],
        "architectures": ["A", "B", "C", "D"],
        "eos_token_id": [1, 2, 3, 4],
        "mrope_section": [1, 2, 3, 4],
        "sizes": [1, 2, 3],
    }
    result = adapted(donor, layers=cut(donor, [3, 0, 1, 1, 2]))
    assert result["num_hidden_layers"] == 5
    assert result["layer_types"] == ["linear", "full", "sliding", "sliding", "full"]
    assert result["no_rope_layers"] == [0, 1, 1, 1, 1]
    for key in ("architectures", "eos_token_id", "mrope_section", "sizes"):
        assert result[key] == donor[key]


def test_each_layer_keeps_what_its_own_model_says() -> None:
    a = {"num_hidden_layers": 2, "layer_types": ["full", "full"]}
    b = {"num_hidden_layers": 3, "layer_types": ["sliding", "full", "linear"]}
    assert adapted(a, layers=[(a, 0), (b, 2), (b, 0), (a, 1)])["layer_types"] == ["full", "linear", "sliding", "full"]


def test_a_model_that_says_nothing_takes_the_donors() -> None:
    a = {"num_hidden_layers": 2, "layer_types": ["x", "y"]}
    b = {"num_hidden_layers": 4}
    assert adapted(a, layers=[(a, 0), (b, 1), (b, 3)])["layer_types"] == ["x", "y", "y"]


def test_the_language_model_of_a_multimodal_config() -> None:
    donor = {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"], "vocab_size": 9, "dtype": "float32"},
        "vision_config": {"num_hidden_layers": 2, "hidden_sizes": [1, 2]},
        "tie_word_embeddings": False,
    }
    result = adapted(donor, layers=cut(donor, [1, 0, 1]), dtype=DType.BF16, tied=True, vocab_size=7)
    assert result == {
        "text_config": {"num_hidden_layers": 3, "layer_types": ["b", "a", "b"], "vocab_size": 7, "dtype": "bfloat16"},
        "vision_config": {"num_hidden_layers": 2, "hidden_sizes": [1, 2]},
        "tie_word_embeddings": True,
    }


def test_what_is_said_on_two_levels_is_changed_on_both() -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "vocab_size": 9, "dtype": "float32"}
    text["tie_word_embeddings"] = False
    vision = {"num_hidden_layers": 2, "layer_types": ["c", "d"], "vocab_size": 9, "dtype": "float32"}
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        donor = {**text, key: text, "vision_config": vision}
        result = adapted(donor, layers=cut(donor, [1, 0, 1]), dtype=DType.BF16, tied=True, vocab_size=7)
        expected = {"num_hidden_layers": 3, "layer_types": ["b", "a", "b"], "vocab_size": 7, "dtype": "bfloat16"}
        expected["tie_word_embeddings"] = True
        assert result == {**expected, key: expected, "vision_config": vision}


def test_a_level_that_counts_other_layers_is_of_another_stack() -> None:
    donor = {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 5, "vocab_size": 9}}
    result = adapted(donor, layers=cut(donor, [1, 0, 1]))
    assert result == {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 5, "vocab_size": 9}}


def test_a_text_config_that_left_the_number_of_layers_to_its_family() -> None:
    donor = {"text_config": {"model_type": "llama"}, "grid": [[1, 2], [3, 4], [5, 6]]}
    result = adapted(donor, layers=cut(donor, [0, 1, 1]))
    assert result == {**donor, "text_config": {"model_type": "llama", "num_hidden_layers": 3}}


def test_lists_beside_the_text_config_are_not_of_its_layers() -> None:
    donor = {"text_config": {"num_hidden_layers": 2}, "grid": [[1, 2], [3, 4]]}
    assert adapted(donor, layers=cut(donor, [1, 0, 1]))["grid"] == donor["grid"]


def test_what_only_the_inner_level_lists_is_cut_too() -> None:
    inner = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    donor = {"num_hidden_layers": 2, "vocab_size": 9, "text_config": inner}
    result = adapted(donor, layers=cut(donor, [1, 1, 0]))
    assert result["text_config"] == {"num_hidden_layers": 3, "layer_types": ["b", "b", "a"]}


@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "float16"}),
        ({"dtype": "float32"}, {"dtype": "float16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({}, {"torch_dtype": "float16"}),
        (
            {"torch_dtype": "x", "text_config": {"torch_dtype": "x"}},
            {"torch_dtype": "float16", "text_config": {"torch_dtype": "float16"}},
        ),
        ({"text_config": {"dtype": "x"}}, {"text_config": {"dtype": "float16"}}),
        ({"text_config": {}}, {"text_config": {}, "torch_dtype": "float16"}),
    ],
)
def test_dtype_in_the_donors_spelling(donor: dict[str, Any], expected: dict[str, Any]) -> None:
    assert adapted(donor, dtype=DType.F16) == expected


@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        ({}, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"text_config": {"tie_word_embeddings": True}}, {"text_config": {"tie_word_embeddings": False}}),
        ({"text_config": {}}, {"text_config": {}, "tie_word_embeddings": False}),
    ],
)
def test_tie_flag_where_the_donor_has_it(donor: dict[str, Any], expected: dict[str, Any]) -> None:
    assert adapted(donor, tied=False) == expected


def test_layers_beyond_the_stack_are_gone_when_it_is_cut() -> None:
    donor = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert adapted(donor, layers=cut(donor, [0, 1, 0]))["num_nextn_predict_layers"] == 0
    assert adapted(donor)["num_nextn_predict_layers"] == 1


def test_lists_of_layer_indices_name_the_new_places() -> None:
    a = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]}
    b = {"num_hidden_layers": 4, "mlp_only_layers": [1]}
    result = adapted(a, layers=[*cut(a, [0, 1, 3]), *cut(b, [0, 1, 2])])
    assert result["mlp_only_layers"] == [0, 2, 4]
    assert adapted(a, layers=cut({"num_hidden_layers": 4}, [0, 3]))["mlp_only_layers"] == []


@pytest.mark.parametrize("key", ["first_k_dense_replace", "max_window_layers"])
def test_numbers_of_leading_layers_are_counted_anew(key: str) -> None:
    donor = {"num_hidden_layers": 6, "use_sliding_window": True, key: 2}
    assert adapted(donor, layers=cut(donor, [0, 1, 1, 4, 5]))[key] == 3
    assert adapted(donor, layers=cut(donor, [3, 4]))[key] == 0
    none = {**donor, key: 0}
    assert adapted(none, layers=cut(none, [3, 0]))[key] == 0
    with pytest.raises(PlanError, match=f"output layer 2, layer 1 of its model, would be .*{key}"):
        adapted(donor, layers=cut(donor, [0, 3, 1, 4]))


def test_windows_that_are_listed_by_layer_may_stand_anywhere() -> None:
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    donor = {"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2, "layer_types": kinds}
    result = adapted(donor, layers=cut(donor, [0, 3, 1, 0]))
    assert result["layer_types"] == [kinds[0], kinds[3], kinds[1], kinds[0]]
    assert result["max_window_layers"] == 1


def test_windows_that_are_not_used_stand_in_nobodys_way() -> None:
    donor = {"num_hidden_layers": 4, "use_sliding_window": False, "max_window_layers": 3}
    assert adapted(donor, layers=cut(donor, [0, 3, 1]))["max_window_layers"] == 3


def refused(donor: dict[str, Any], indices: Sequence[int], key: str, place: int) -> None:
    with pytest.raises(
        PlanError, match=f"output layer {place}, layer {indices[place]} of its model, .*{key}"
    ) as raised:
        adapted(donor, layers=cut(donor, indices))
    assert key in str(raised.value.remedy)


ORDER = [0, 1, 2, 3, 2, 3, 4, 5]


def test_a_list_of_kinds_is_written_where_the_family_reads_one() -> None:
    donor = {"model_type": "gemma2", "num_hidden_layers": 6}
    s, f = "sliding_attention", "full_attention"
    assert adapted(donor, layers=cut(donor, [0, 1, 1, 2]))["layer_types"] == [s, f, f, s]
    assert "layer_types" not in adapted(donor, layers=cut(donor, [2, 3, 0, 1])), "the order says it"
    gemma3 = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    result = adapted(gemma3, layers=cut(gemma3, [1, 2, 3, 5]))
    assert result["layer_types"] == [s, f, s, f]
    assert result["sliding_window_pattern"] == 3


def test_kinds_of_layers_from_models_with_other_keys() -> None:
    a = {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 2}
    b = {"model_type": "qwen3_next", "num_hidden_layers": 4}
    c = {"text_config": {"model_type": "qwen3_next", "num_hidden_layers": 2, "layer_types": ["full_attention", "x"]}}
    kinds = adapted(a, layers=[(a, 0), (a, 1), (b, 1), (b, 3), (c, 0)])["layer_types"]
    assert [kind[0] for kind in kinds] == ["l", "f", "l", "f", "f"]


def test_kinds_inside_of_a_multimodal_config() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 2}
    donor = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "gemma3", "num_layers": 6}}
    result = adapted(donor, layers=cut(donor, [1, 0]))
    assert result["text_config"]["layer_types"] == ["full_attention", "sliding_attention"]
    assert result["vision_config"] == donor["vision_config"]


def test_the_last_layer_that_a_family_makes_another() -> None:
    donor = {"model_type": "gemma4_text", "num_hidden_layers": 7}
    assert adapted(donor, layers=cut(donor, [0, 5, 6]))["layer_types"][1:] == ["full_attention"] * 2
    refused(donor, [0, 1, 6, 2], "layer_types", 3)


def test_configs_of_single_layers_go_with_them() -> None:
    wide = {"5": {"head_dim": 16}, "6": {"head_dim": 32}}
    donor = {"model_type": "gemma4_text", "num_hidden_layers": 7, "per_layer_config": wide}
    result = adapted(donor, layers=cut(donor, [5, 0, 5, 6]))
    assert result["per_layer_config"] == {"0": wide["5"], "2": wide["5"], "3": wide["6"]}


def test_layers_that_are_not_sparse_are_listed_where_a_step_does_not_say_it() -> None:
    donor = {"num_hidden_layers": 6, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    same = adapted(donor, layers=cut(donor, [0, 1, 2, 3]))
    assert (same["decoder_sparse_step"], same["mlp_only_layers"]) == (2, [3])
    result = adapted(donor, layers=cut(donor, ORDER))
    assert (result["decoder_sparse_step"], result["mlp_only_layers"]) == (1, [0, 2, 3, 4, 5, 6])


def test_other_periods_that_say_it() -> None:
    jamba = {"model_type": "jamba", "num_hidden_layers": 9, "attn_layer_period": 4, "attn_layer_offset": 2}
    result = adapted(jamba, layers=cut(jamba, [1, 2, 3, 4, 5, 6]))
    assert (result["attn_layer_period"], result["attn_layer_offset"]) == (4, 1)
    assert (result["expert_layer_period"], result["expert_layer_offset"]) == (2, 0)
    refused(jamba, [0, 2, 2], "attn_layer_period", 1)
    ernie = {"model_type": "ernie4_5_moe", "num_hidden_layers": 6, "moe_layer_start_index": 2, "moe_layer_interval": 2}
    result = adapted(ernie, layers=cut(ernie, [0, 3, 5, 5, 4]))
    assert [result[f"moe_layer_{key}"] for key in ("start_index", "end_index", "interval")] == [1, 3, 1]
    refused(ernie, [3, 3, 0, 3], "moe_layer_interval", 2)


def test_periods_of_unknown_families_have_to_go_on() -> None:
    donor = {"model_type": "new", "num_hidden_layers": 8, "attn_layer_period": 4}
    assert adapted(donor, layers=cut(donor, [4, 5, 6, 7, 0, 1]))["num_hidden_layers"] == 6
    refused(donor, [0, 1, 2, 3, 1], "attn_layer_period", 4)
    listed = {**donor, "layers_block_type": list("abababab")}
    assert adapted(listed, layers=cut(listed, [1, 1]))["layers_block_type"] == ["b", "b"]


def test_attention_that_is_divided_by_the_number_of_the_layer() -> None:
    key = "scale_attn_by_inverse_layer_idx"
    donor = {"model_type": "gpt2", "n_layer": 4, key: True}
    assert adapted(donor, layers=cut(donor, [0, 1, 2]))["n_layer"] == 3
    refused(donor, [0, 1, 1], key, 2)
    assert adapted({**donor, key: False}, layers=cut({**donor, key: False}, [0, 1, 1]))["n_layer"] == 3


def test_kimis_lists_begin_with_one() -> None:
    lists = {"kda_layers": [1, 2, 4], "full_attn_layers": [3, 5], "head_dim": 8}
    donor = {"model_type": "kimi_linear", "num_hidden_layers": 5, "linear_attn_config": lists}
    result = adapted(donor, layers=cut(donor, [0, 2, 2, 3, 4]))["linear_attn_config"]
    assert result == {"kda_layers": [1, 4], "full_attn_layers": [2, 3, 5], "head_dim": 8}


@pytest.mark.parametrize(
    ("donor", "key", "expected"),
    [
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern", "M*-"),
        ({"sparse_attention_config": {"freq": [0, 1, 1, 0], "dim": 4}}, "sparse_attention_config", None),
        ({"model_type": "recurrent_gemma", "block_types": ["r", "a"]}, "block_types", ["r", "a", "a"]),
        ({"model_type": "gpt_neo"}, "attention_types", [[["global", "local", "local"], 1]]),
        ({"attn_layer_indices": [1, 3]}, "attn_layer_indices", [1, 2]),
        ({"kv_source_layers": [0, 1, 1, 0]}, "kv_source_layers", [0, 0, 2]),
    ],
)
def test_other_forms(donor: dict[str, Any], key: str, expected: Any) -> None:
    donor = {"num_hidden_layers": 4, **donor}
    expected = {"freq": [0, 0, 1], "dim": 4} if expected is None else expected
    assert adapted(donor, layers=cut(donor, [0, 3, 1]))[key] == expected


def test_layers_that_share_keys_of_others_come_last() -> None:
    donor = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    assert adapted(donor, layers=cut(donor, [0, 1, 2, 2, 3]))["num_kv_shared_layers"] == 3
    refused(donor, [0, 2, 1, 3], "num_kv_shared_layers", 1)
    pointing = {"num_hidden_layers": 4, "kv_source_layers": [0, 1, 1, 0]}
    with pytest.raises(PlanError, match=r"output layer 1, layer 2 of its model, .* of layer 1 there .kv_source_layers"):
        adapted(pointing, layers=cut(pointing, [0, 2]))


def test_lists_with_items_for_layers_beyond_the_stack() -> None:
    donor = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "layer_types": ["a", "b", "c"]}
    assert adapted(donor, layers=cut(donor, [1, 0, 1]))["layer_types"] == ["b", "a", "b"]


KEYS = sorted(
    {key for rule in RULES for key in (rule.key, *rule.triggers, *rule.told_by)}
    | {"decoder_sparse_step", "no_rope_layer_interval", "sliding_window", "use_sliding_window", "linear_attn_config"}
    | {"compress_ratios", "sparse_attention_config", "index_topk_freq", "index_topk_pattern", "moe_layers_enum"}
    | {"prefix_dense_sliding_window_pattern", "attn_layer_offset", "moe_layer_start_index", "moe_layer_end_index"}
    | {"per_layer_config", "kv_source_layers", "hybrid_override_pattern", "rope_parameters", "local_layer_ids"}
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(["", "a", "FSS", "1,x,3", "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["0", "kda_layers", "full_attn_layers", "rope_theta"]), inner)
    ),
    max_leaves=8,
)
TYPES = st.sampled_from(sorted({family for rule in RULES for family in rule.families})) | VALUES


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), TYPES, st.lists(st.integers(0, 3), max_size=6))
def test_whatever_a_config_holds_it_is_adapted_or_refused(told: dict[str, Any], kind: Any, order: list[int]) -> None:
    donor = {**told, "model_type": kind, "num_hidden_layers": 4}
    with contextlib.suppress(PlanError):
        assert adapted(donor, layers=cut(donor, order))["num_hidden_layers"] == len(order)
