"""Families of Mixtures of Experts: which models they take, why not others, and what their configs say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.architectures.moe.configs import layer_windows, rope_settings
from mergekit_ray.architectures.moe.family import GATE, DenseModel, Wanted
from mergekit_ray.architectures.moe.registry import FAMILIES, choose
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.core.tensors import TensorSpec

HIDDEN, INNER = 8, 12
LAYER = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
]
QK_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
BIASES = [f"self_attn.{x}_proj.bias" for x in "qkvo"]
OLMO = [name for name in LAYER if name != "input_layernorm.weight"] + [
    "post_feedforward_layernorm.weight",
    *QK_NORMS,
]
LAYERS: dict[str, Sequence[str]] = {
    "llama": LAYER,
    "mistral": LAYER,
    "qwen2": [*LAYER, *BIASES[:3]],
    "qwen3": [*LAYER, *QK_NORMS],
    "olmo2": OLMO,
}
WITH_EXAMPLES = {"custom", "deepseek", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe"}
"""Families that a recipe in configs/ shows."""
TWO = Wanted(num_experts=2, experts_per_token=2)
SHARED = Wanted(num_experts=2, experts_per_token=2, has_shared=True)


def shape_of(rest: str) -> tuple[int, ...]:
    if rest.endswith("norm.weight"):
        return (HIDDEN,)
    rows = {"k": 4, "v": 4}.get(rest.split(".")[1][0], HIDDEN) if rest.startswith("self_attn") else INNER
    if rest.startswith("mlp.down"):
        return (HIDDEN, INNER)
    return (rows,) if rest.endswith("bias") else (rows, HIDDEN)


def dense(
    model_type: str,
    config: Mapping[str, Any] | None = None,
    *,
    layer: Sequence[str] | None = None,
    more: Mapping[str, tuple[int, ...]] | None = None,
    stack: str = "model.layers",
) -> DenseModel:
    """A model of two layers with four heads, two of them for keys and values."""
    names = LAYERS.get(model_type, LAYER) if layer is None else layer
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"{stack}.{i}.{rest}": shape_of(rest) for i in range(2) for rest in names}
    shapes |= {"lm_head.weight": (10, HIDDEN), **(more or {})}
    specs = {name: TensorSpec(name, DType.BF16, shape) for name, shape in shapes.items()}
    given = {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False, **(config or {})}
    if model_type:
        given["model_type"] = model_type
    return DenseModel("/base", given, specs, anatomy(specs, given, "/base"))


class TestChoice:
    def test_families_there_are(self) -> None:
        assert set(FAMILIES.names()) >= WITH_EXAMPLES
        for name in FAMILIES.names():
            family = FAMILIES.get(name)
            assert family.name == name
            assert family.class_name.endswith("ForCausalLM")

    @pytest.mark.parametrize(
        ("model_type", "wanted", "expected"),
        [
            ("llama", TWO, "mixtral"),
            ("mistral", TWO, "mixtral"),
            ("llama", SHARED, "qwen2_moe"),
            ("mistral", SHARED, "qwen2_moe"),
            ("qwen2", TWO, "qwen2_moe"),
            ("qwen2", SHARED, "qwen2_moe"),
            ("qwen3", TWO, "qwen3_moe"),
            ("olmo2", TWO, "flex_olmo"),
        ],
    )
    def test_inferred(self, model_type: str, wanted: Wanted, expected: str) -> None:
        assert choose(dense(model_type), wanted).name == expected

    @pytest.mark.parametrize(
        ("name", "model_type", "expected"),
        [
            ("deepseek", "llama", "deepseek"),
            ("qwen2_moe", "llama", "qwen2_moe"),
            ("qwen", "qwen2", "qwen2_moe"),
            ("qwen3", "qwen3", "qwen3_moe"),
            ("flexolmo", "olmo2", "flex_olmo"),
        ],
    )
    def test_by_name_or_another_spelling_of_it(self, name: str, model_type: str, expected: str) -> None:
        assert choose(dense(model_type), TWO, name).name == expected

    def test_attention_biases_go_where_there_is_room_for_them(self) -> None:
        assert choose(dense("llama", layer=[*LAYER, *BIASES[:3]]), TWO).name == "qwen2_moe"
        # An output bias as well: neither Mixtral nor Qwen2-MoE has one.
        family = choose(dense("llama", layer=[*LAYER, *BIASES]), TWO)
        assert family.name == "deepseek"
        assert family.config(dense("llama", layer=[*LAYER, *BIASES]), TWO)["attention_bias"] is True

    def test_what_no_other_family_takes_is_custom(self) -> None:
        assert choose(dense("gemma2"), TWO).name == "custom"

    def test_none_fits_says_why_of_each(self) -> None:
        layer = [name for name in LAYER if not name.startswith("mlp")]
        with pytest.raises(ModelError) as caught:
            choose(dense("mamba", layer=layer), TWO)
        message = str(caught.value)
        for family in set(FAMILIES.names()) - {"custom"}:
            assert f"{family}: takes " in message
        assert "custom: needs a feed-forward module in each layer" in message
        assert "found mamba" in message
        assert "mixtral from llama, mistral" in message
        assert caught.value.where == "model /base"

    def test_a_config_without_a_type(self) -> None:
        with pytest.raises(ModelError, match="found no model_type"):
            choose(dense(""), TWO)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match="unknown MoE architecture 'qwen3_mo'; did you mean 'qwen3_moe'"):
            choose(dense("qwen3"), TWO, "qwen3_mo")

    def test_examples(self) -> None:
        examples = Path(__file__).parents[3] / "configs"
        loaded = [load_recipe(file) for file in sorted(examples.glob("moe*.yml"))]
        shown = {each.architecture for each in loaded if isinstance(each, MoeRecipe)} - {None}
        assert shown >= WITH_EXAMPLES
        assert shown <= set(FAMILIES.names())


class TestObjections:
    def objections(self, family: str, base: DenseModel, wanted: Wanted = TWO) -> list[str]:
        return FAMILIES.get(family)().objections(base, wanted)

    def test_tensors_without_a_place(self) -> None:
        layer = [*LAYER, "mlp.gate_proj.bias"]
        base = dense("llama", layer=layer, more={"score.weight": (1, HIDDEN)})
        expected = "has no place for score.weight, model.layers.*.mlp.gate_proj.bias"
        assert self.objections("mixtral", base) == [expected]

    def test_tensors_that_are_missing(self) -> None:
        base = dense("llama", layer=[name for name in LAYER if name != GATE])
        assert self.objections("mixtral", base) == ["needs in every layer mlp.gate_proj.weight"]

    def test_tensors_of_some_layers_only(self) -> None:
        base = dense("qwen2", more={f"model.layers.1.{BIASES[3]}": (HIDDEN,)})
        assert self.objections("qwen2_moe", base) == [f"has no place for model.layers.*.{BIASES[3]}"]
        base = dense("qwen3", more={f"model.layers.1.{BIASES[0]}": (HIDDEN,)})
        (needed,) = self.objections("qwen3_moe", base)
        assert needed == f"needs in every layer {', '.join(sorted(BIASES))}"
        half = dense("llama", more={f"model.layers.1.{BIASES[0]}": (HIDDEN,)})
        assert self.objections("qwen2_moe", half) == [f"needs in every layer {BIASES[0]}"]

    def test_layers_called_otherwise(self) -> None:
        base = dense("llama", stack="language_model.model.layers")
        (found,) = self.objections("mixtral", base)
        assert found == "expects the layers to be called model.layers.<n>, found language_model.model.layers"

    def test_shared_experts_and_packed_ones(self) -> None:
        assert self.objections("mixtral", dense("llama"), SHARED) == ["has no shared experts"]
        packed = Wanted(2, 2, packed=True)
        assert self.objections("deepseek", dense("llama"), packed) == ["has no packed layout of its experts"]
        assert self.objections("mixtral", dense("llama"), packed) == []

    def test_attention_windows(self) -> None:
        some = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        assert self.objections("qwen3_moe", dense("qwen3", some)) == [
            "has attention windows in all layers or in none, found them in some"
        ]
        assert self.objections("qwen3_moe", dense("qwen3", {**some, "max_window_layers": 0})) == []
        assert self.objections("qwen2_moe", dense("qwen2", some)) == []
        assert self.objections("deepseek", dense("mistral", {"sliding_window": 4})) == [
            "has no attention windows, found one of 4 tokens"
        ]
        assert self.objections("deepseek", dense("mistral", {"sliding_window": None})) == []

    def test_heads_that_do_not_fill_the_hidden_size(self) -> None:
        wide = {f"model.layers.{i}.self_attn.{x}_proj.weight": (16, HIDDEN) for i in range(2) for x in "q"}
        base = dense("llama", {"head_dim": 4}, more=wide)
        assert self.objections("deepseek", base) == [
            "has heads that fill the hidden size exactly, found another head_dim"
        ]
        assert FAMILIES.get("mixtral")().config(base, TWO)["head_dim"] == 4


class TestConfigs:
    def test_mixtral_of_a_config_that_says_next_to_nothing(self) -> None:
        config = FAMILIES.get("mixtral")().config(dense("llama", {"pretraining_tp": 1, "head_dim": None}), TWO)
        assert config == {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "vocab_size": 10,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }

    def test_what_the_base_says_is_kept(self) -> None:
        given = {"rms_norm_eps": 1e-5, "max_position_embeddings": 77, "bos_token_id": 5, "hidden_act": "gelu"}
        for model_type, family in [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("olmo2", "flex_olmo")]:
            config = FAMILIES.get(family)().config(dense(model_type, given), TWO)
            assert given.items() <= config.items()

    @pytest.mark.parametrize(
        ("given", "expected"), [({}, 4096), ({"sliding_window": 9}, 9), ({"sliding_window": None}, None)]
    )
    def test_mixtral_has_mistrals_window(self, given: dict[str, Any], expected: int | None) -> None:
        assert FAMILIES.get("mixtral")().config(dense("mistral", given), TWO)["sliding_window"] == expected

    def test_experts_are_counted_by_each_familys_own_names(self) -> None:
        wanted = Wanted(num_experts=8, experts_per_token=3)
        for model_type, family, experts, active in [
            ("llama", "mixtral", "num_local_experts", "num_experts_per_tok"),
            ("qwen2", "qwen2_moe", "num_experts", "num_experts_per_tok"),
            ("qwen3", "qwen3_moe", "num_experts", "num_experts_per_tok"),
            ("olmo2", "flex_olmo", "num_experts", "num_experts_per_tok"),
            ("llama", "deepseek", "n_routed_experts", "num_experts_per_tok"),
        ]:
            config = FAMILIES.get(family)().config(dense(model_type), wanted)
            assert (config[experts], config[active]) == (8, 3)
            assert config.get("norm_topk_prob", True) is True

    def test_qwen2_moe_shared_expert(self) -> None:
        family = FAMILIES.get("qwen2_moe")()
        assert family.config(dense("llama"), SHARED)["shared_expert_intermediate_size"] == INNER
        large = dense("llama", more={f"model.layers.{i}.{GATE}": (500, HIDDEN) for i in range(2)})
        assert family.config(large, TWO)["shared_expert_intermediate_size"] == 128
        assert family.config(large, TWO)["moe_intermediate_size"] == 500

    def test_qwen2_moe_windows(self) -> None:
        family = FAMILIES.get("qwen2_moe")()
        assert family.config(dense("llama"), TWO)["use_sliding_window"] is False
        config = family.config(dense("mistral", {"sliding_window": 7}), TWO)
        wanted = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
        assert wanted.items() <= config.items()
        assert config["layer_types"] == ["sliding_attention"] * 2

    def test_deepseek_without_a_shared_expert(self) -> None:
        family = FAMILIES.get("deepseek")()
        assert family.config(dense("llama"), TWO)["n_shared_experts"] is None
        assert family.config(dense("llama"), SHARED)["n_shared_experts"] == 1
        assert any("experts_per_token: 2" in text for text in family.caveats(Wanted(4, 1)))
        assert not any("experts_per_token" in text for text in family.caveats(TWO))

    def test_the_base_is_left_as_it_is(self) -> None:
        base = dense(
            "qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}, "layer_types": ["full_attention"] * 2}
        )
        before = repr(base.config)
        config = FAMILIES.get("qwen2_moe")().config(base, TWO)
        config["layer_types"].append("changed")
        config["rope_scaling"]["factor"] = 3.0
        assert repr(base.config) == before


class TestRope:
    @pytest.mark.parametrize(
        ("given", "theta", "scaling", "parameters"),
        [
            ({}, 10000.0, None, {"rope_type": "default"}),
            ({"rope_theta": 5e5}, 5e5, None, {"rope_type": "default"}),
            ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None, {"rope_type": "default"}),
            (
                {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
                5e5,
                {"type": "linear", "rope_type": "linear", "factor": 2.0},
                {"rope_type": "linear", "factor": 2.0},
            ),
            (
                {"rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn", "factor": 4.0}},
                7.0,
                {"rope_type": "yarn", "factor": 4.0},
                {"rope_type": "yarn", "factor": 4.0},
            ),
            ({"rope_theta": 3.0, "rope_scaling": {}, "rope_parameters": None}, 3.0, None, {"rope_type": "default"}),
        ],
    )
    def test_both_spellings(
        self, given: dict[str, Any], theta: float, scaling: dict[str, Any] | None, parameters: dict[str, Any]
    ) -> None:
        assert rope_settings(given) == {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_parameters": {**parameters, "rope_theta": theta},
        }

    def test_settings_by_type_of_layer_have_one_spelling(self) -> None:
        assert rope_settings({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}) == {}


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", {}, [None, None]),
        ("mistral", {}, [4096, 4096]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("qwen2", {"sliding_window": 5}, [None, None]),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, [None, None]),  # from layer 28 on
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, [None, 5]),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1}, [None, None]),
        (
            "qwen3",
            {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            [5, None],
        ),
    ],
)
def test_attention_windows_by_layer(model_type: str, config: dict[str, Any], expected: list[int | None]) -> None:
    assert layer_windows(dense(model_type, config)) == expected
