"""The output's config.json."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.output_config import output_config


def adapted(donor: dict[str, Any], **changes: Any) -> dict[str, Any]:
    before = copy.deepcopy(donor)
    result = output_config(donor, **{"layers": None, "dtype": None, "tied": None, "vocab_size": None, **changes})
    assert donor == before, "the donor's config is not touched"
    return result


def cut(config: dict[str, Any], indices: Sequence[int]) -> list[tuple[dict[str, Any], int]]:
    return [(config, i) for i in indices]


def test_nothing_to_change() -> None:
    donor = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "dtype": "float16"}
    assert adapted(donor) == donor


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_layer_counts_under_every_name(key: str) -> None:
    assert adapted({key: 2}, layers=cut({key: 2}, [0, 1, 1])) == {key: 3}


def test_all_names_of_the_layer_count_agree() -> None:
    donor = {"num_hidden_layers": 2, "n_layer": 2}
    assert adapted(donor, layers=cut(donor, [0])) == {"num_hidden_layers": 1, "n_layer": 1}


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
    assert adapted({**donor, key: 0}, layers=cut(donor, [3, 0]))[key] == 0
    with pytest.raises(PlanError, match=f"output layer 2 is one of the first 2 .*{key}"):
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
