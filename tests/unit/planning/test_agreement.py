"""Configs that contradict each other, and layers that one config cannot describe: told before anything is read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.agreement import check_pair
from mergekit_ray.planning.make import make_plan, models_of
from support.fake_checkpoints import LINEAR, Shapes, checkpoint, llama, llama_shapes, plan_of

CUT = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /b, layer_range: [0, 2]}]
"""
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def model(path: str, num_layers: int = 2, **config: Any) -> Any:
    found = llama(path, num_layers)
    return replace(found, config={**found.config, **config})


def of(path: str, shapes: Shapes, **config: Any) -> Any:
    return checkpoint(path, shapes, {"model_type": "llama", "num_hidden_layers": 2, **config})


def plan_anyway(text: str, *checkpoints: Any) -> Plan:
    found = {ModelReference.parse(each.reference): each for each in checkpoints}
    return make_plan(load_recipe(text), found, allow_config_conflicts=True)


def refusal(text: str, *checkpoints: Any) -> list[str]:
    """The lines of the error, but for the remedy."""
    with pytest.raises(ModelError) as caught:
        plan_of(text, *checkpoints)
    assert "`options=MergeOptions(allow_config_conflicts=True)`" in str(caught.value.remedy)
    first, *lines = caught.value.what.splitlines()
    assert first == "no config.json can describe these models together:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize("text", [LINEAR, CUT])
@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"num_attention_heads": 4}, {"num_attention_heads": 2}, "num_attention_heads: 4 in /a, 2 in /b"),
        ({"n_head": 4}, {"num_attention_heads": 2}, "n_head: 4 in /a, 2 in /b"),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 1}, "num_key_value_heads: 2 in /a, 1 in /b"),
        ({"head_dim": 8}, {"head_dim": 16}, "head_dim: 8 in /a, 16 in /b"),
        ({"hidden_size": 4}, {"hidden_size": 5}, "hidden_size: 4 in /a, 5 in /b"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act: 'silu' in /a, 'gelu' in /b"),
        ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}, "hidden_act: 'gelu' in /a, 'quick_gelu' in /b"),
        ({"num_local_experts": 8}, {"num_experts": 4}, "num_local_experts: 8 in /a, 4 in /b"),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 3}, "num_experts_per_tok: 2 in /a, 3 in /b"),
        ({"rotary_pct": 0.25}, {"rotary_pct": 1.0}, "rotary_pct: 0.25 in /a, 1.0 in /b"),
        (
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor: 0.5 in /a, 0.25 in /b",
        ),
        ({"use_qk_norm": True}, {"use_qk_norm": False}, "use_qk_norm: True in /a, False in /b"),
    ],
)
def test_structure_must_be_alike(text: str, ours: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    a, b = model("/a", **ours), model("/b", **theirs)
    assert refusal(text, a, b) == [said]
    assert (
        f"the models' configs differ: {said}; the result has the config.json of /a" in plan_anyway(text, a, b).warnings
    )


@pytest.mark.parametrize("text", [LINEAR, CUT])
@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 1000000}, "rope_theta: 10000.0 in /a, 1000000 in /b"),
        (
            {"rope_theta": 1e4},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta: 10000.0 in /a, 1000000.0 in /b",
        ),
        (  # which of the two holds depends on the version of transformers
            {"rope_parameters": {"rope_theta": 1e4}},
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6},
            "rope_theta: 10000.0 in /a, (10000.0, 1000000.0) in /b",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {},
            "rope_scaling: {'rope_type': 'linear', 'factor': 2.0} in /a, None in /b",
        ),
        ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window: 4096 in /a, None in /b"),
        (
            {"sliding_window": 4096, "use_sliding_window": True},
            {"sliding_window": 4096, "use_sliding_window": False},
            "sliding_window: 4096 in /a, None in /b",
        ),
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 in /a, 1e-05 in /b"),
        (
            {"max_position_embeddings": 64},
            {"max_position_embeddings": 128},
            "max_position_embeddings: 64 in /a, 128 in /b",
        ),
        (
            {"id2label": {"0": "B", "1": "A", "2": "C"}},
            {"id2label": {"0": "A", "1": "B", "2": "C"}},
            "id2label: {'0': 'B', '1': 'A'} in /a, {'0': 'A', '1': 'B'} in /b",
        ),
        (
            {"label2id": {"A": 0, "B": 1}},
            {"id2label": {0: "A", 1: "C"}},
            "id2label: {'1': 'B'} in /a, {'1': 'C'} in /b",
        ),
        (
            {"problem_type": "regression"},
            {"problem_type": "multi_label_classification"},
            "problem_type: 'regression' in /a, 'multi_label_classification' in /b",
        ),
        ({"image_token_index": 9}, {"image_token_id": 8}, "image_token_index: 9 in /a, 8 in /b"),
        ({"mm_tokens_per_image": 1}, {"mm_tokens_per_image": 4}, "mm_tokens_per_image: 1 in /a, 4 in /b"),
        (
            {"final_logit_softcapping": 30.0},
            {"final_logit_softcapping": None},
            "final_logit_softcapping: 30.0 in /a, None in /b",
        ),
    ],
)
def test_nuances_are_named(text: str, ours: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    plan = plan_of(text, model("/a", **ours), model("/b", **theirs))
    assert plan.warnings == (f"the models' configs differ: {said}; the result has the config.json of /a",)


@pytest.mark.parametrize("text", [LINEAR, CUT])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (HEADS, HEADS),
        (HEADS, {}),
        ({"head_dim": 1}, {"head_dim": None}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"hidden_act": "gelu", "hidden_activation": None}, {"hidden_activation": "gelu_pytorch_tanh"}),
        ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
        ({"intermediate_size": 6}, {"intermediate_size": [6, 6]}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                }
            },
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
            {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [1, 1]}},
        ),
        ({"sliding_window": 9, "use_sliding_window": False}, {"sliding_window": None, "use_sliding_window": False}),
        ({"attention_bias": False}, {}),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {"id2label": {"0": "B", "1": "A"}}),
        ({"label2id": {"B": 0, "A": 1}}, {"id2label": {"0": "B", "1": "A"}}),
        ({"time_step_limit": [0.0, math.inf]}, {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
        ({"_name_or_path": "a", "transformers_version": "4.40.0", "eos_token_id": 2}, {"eos_token_id": 7}),
        ({"tie_word_embeddings": False, "use_cache": True}, {"use_cache": False}),
    ],
)
def test_what_says_the_same_is_no_difference(text: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for first, second in ((ours, theirs), (theirs, ours)):
        assert not plan_of(text, model("/a", **first), model("/b", **second)).warnings


def test_all_conflicts_of_all_models_are_told_at_once() -> None:
    three = LINEAR + "- {model: /c, parameters: {weight: 1}}\n"
    b, c = model("/b", **{**HEADS, "num_attention_heads": 2}), model("/c", num_attention_heads=2, num_key_value_heads=1)
    assert refusal(three, model("/a", **HEADS), b, c) == [
        "num_attention_heads: 4 in /a, 2 in /b and /c",
        "num_key_value_heads: 2 in /a and /b, 1 in /c",
    ]


def test_the_levels_of_a_multimodal_config_are_compared_each() -> None:
    a = model("/a", num_attention_heads=4, vision_config={"num_heads": 2, "patch_size": 14})
    text = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}
    b = replace(a, source=replace_path(a, "/b"), reference="/b")
    nested = {"model_type": "llava", "text_config": text, "vision_config": {"num_heads": 4, "patch_size": 14}}
    assert refusal(LINEAR, a, replace(b, config=nested)) == [
        "num_attention_heads: 4 in /a, 2 in /b",
        "vision_config.num_heads: 2 in /a, 4 in /b",
    ]


def replace_path(found: Any, path: str) -> Any:
    return type(found.source)(path)


def test_text_models_below_other_names_are_of_one_type() -> None:
    nested = {"model_type": "gemma3", "text_config": {"model_type": "llama_text", "num_hidden_layers": 2}}
    assert not plan_of(LINEAR, model("/a"), replace(llama("/b"), config=nested)).warnings


# -- slices -----------------------------------------------------------------------------------------------------------


def test_slices_of_unlike_architectures_are_refused_and_merges_warned_of() -> None:
    a, b = model("/a"), model("/b", model_type="mistral")
    assert refusal(CUT, a, b) == ["model_type: 'llama' in /a, 'mistral' in /b"]
    assert "model_type: 'llama' in /a, 'mistral' in /b" in plan_of(LINEAR, a, b).warnings[0]


def test_without_a_model_type_the_classes_are_compared() -> None:
    def named(path: str, name: str) -> Any:
        return checkpoint(path, llama_shapes(2), {"num_hidden_layers": 2, "architectures": [name]})

    assert refusal(CUT, named("/a", "AlphaForCausalLM"), named("/b", "BetaForCausalLM")) == [
        "architectures: Alpha in /a, Beta in /b"
    ]
    [line] = plan_of(CUT, named("/a", "AlphaForCausalLM"), named("/b", "AlphaForMaskedLM")).warnings
    assert "architectures: 'AlphaForCausalLM' in /a, 'AlphaForMaskedLM' in /b" in line


def test_layers_with_tensors_that_the_donor_does_not_know() -> None:
    """A Llama and a Qwen2 that calls itself one: its biases would be ignored."""
    biased = llama_shapes(2) | {f"model.layers.{i}.self_attn.q_proj.bias": (4,) for i in range(2)}
    a, b = of("/a", llama_shapes(2)), of("/b", biased)
    assert refusal(CUT, a, b) == [
        "model.layers.0.self_attn.q_proj.bias of /b: no layer of /a has such a tensor (and so in 1 more layer)"
    ]
    turned = CUT.replace("/a", "/x").replace("/b", "/a").replace("/x", "/b")
    assert refusal(turned, a, b) == [
        "model.layers.0.self_attn.q_proj.bias: absent in /a, there in each layer of /b (and so in 1 more layer)"
    ]


def test_layers_of_other_sizes() -> None:
    a, b = of("/a", llama_shapes(2)), of("/b", llama_shapes(2, inner=7))
    assert refusal(CUT, a, b) == [
        "model.layers.0.mlp.up_proj.weight: [7, 4] in /b, [6, 4] in /a (and so in 1 more layer)"
    ]
    wide = of("/b", llama_shapes(2, hidden=5) | {f"model.layers.{i}.z.weight": (5,) for i in range(2)})
    assert refusal(CUT, a, wide)[-1] == "1 more tensor of the layers of /b differs"


def test_only_the_layers_that_are_taken_count() -> None:
    odd = llama_shapes(2) | {"model.layers.1.mlp.up_proj.weight": (7, 4)}
    first = CUT.replace("{model: /b, layer_range: [0, 2]}", "{model: /b, layer_range: [0, 1]}")
    assert not plan_of(first, of("/a", llama_shapes(2)), of("/b", odd)).warnings
    assert refusal(CUT, of("/a", llama_shapes(2)), of("/b", odd)) == [
        "model.layers.1.mlp.up_proj.weight: [7, 4] in /b, [6, 4] in /a"
    ]


def test_models_whose_layers_differ_say_so_in_their_configs() -> None:
    """OpenELM and Nemotron-NAS have sizes for each layer, hybrids layers of several kinds."""
    several = llama_shapes(2) | {"model.layers.1.mlp.up_proj.weight": (9, 4), "model.layers.1.mixer.A_log": (4,)}
    other = llama_shapes(2) | {"model.layers.0.mlp.up_proj.weight": (7, 4), "model.layers.0.mixer.A_log": (4,)}
    a, b = of("/a", several, intermediate_size=[6, 9]), of("/b", other, intermediate_size=[7, 6])
    assert not plan_of(CUT, a, b).warnings


def test_what_is_computed_again_is_no_layer_of_another_kind() -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (2,) for i in range(2)}
    assert not plan_of(CUT, of("/a", llama_shapes(2)), of("/b", llama_shapes(2) | buffers)).warnings


def test_the_base_of_a_slice_leads() -> None:
    """Its layers are the ones that others are merged into; the config is the recipe's base's."""
    text = """
merge_method: slerp
base_model: /a
parameters: {t: 0.5}
slices:
- sources: [{model: /a, layer_range: [0, 2]}, {model: /b, layer_range: [0, 2]}]
"""
    assert refusal(text, model("/a", **HEADS), model("/b", **HEADS, model_type="mistral")) == [
        "model_type: 'llama' in /a, 'mistral' in /b"
    ]
    assert not plan_of(text, model("/a", **HEADS), model("/b", **HEADS)).warnings


SHIFTED = """
merge_method: linear
slices:
- sources:
  - {model: /a, layer_range: [0, 4], parameters: {weight: 1}}
  - {model: /b, layer_range: [%d, %d], parameters: {weight: 1}}
"""


@pytest.mark.parametrize(
    ("config", "first", "said"),
    [
        (
            {"model_type": "olmo3"},
            3,
            "0: layer_types is 'sliding_attention' in layer 0 of /a, 'full_attention' in layer 3 of /b",
        ),
        (
            {"model_type": "x", "layer_types": ["u", "u", "u", "v", "u", "u", "v", "v"]},
            2,
            "1: layer_types is 'u' in layer 1 of /a, 'v' in layer 3 of /b",
        ),
        ({"model_type": "olmo3"}, 4, None),
        ({"model_type": "x", "sliding_window_pattern": 3}, 1, None),
        ({"model_type": "qwen2", "max_window_layers": 6}, 4, None),
        (
            {"model_type": "qwen2", "max_window_layers": 6, "use_sliding_window": True, "sliding_window": 8},
            4,
            "2: max_window_layers is True in layer 2 of /a, False in layer 6 of /b",
        ),
    ],
)
def test_layers_of_different_kinds_made_one(config: dict[str, Any], first: int, said: str | None) -> None:
    both = [model(path, 8, **config) for path in ("/a", "/b")]
    warnings = plan_of(SHIFTED % (first, first + 4), *both).warnings
    assert len(warnings) == (said is not None)
    for warning in warnings:
        place, _, kinds = str(said).partition(": ")
        assert warning.startswith(f"output layer {place} merges layers of different kinds: {kinds} (and 1 more)")


# -- Mixtures of Experts, modules and adapters ------------------------------------------------------------------------


GATED: dict[str, Any] = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "vocab_size": 10,
}
EXPERTS = "base_model: /a\ngate_mode: random\nexperts:\n- source_model: /a\n- source_model: /b\n"


def gated_shapes() -> Shapes:
    gated = llama_shapes(2)
    for i in range(2):
        gated |= {f"model.layers.{i}.mlp.gate_proj.weight": (6, 4), f"model.layers.{i}.mlp.down_proj.weight": (4, 6)}
        gated |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (4, 4) for p in "kvo"}
        gated |= {f"model.layers.{i}.post_attention_layernorm.weight": (4,)}
    return gated


def test_experts_need_not_have_the_attention_of_the_base() -> None:
    a = of("/a", gated_shapes(), **GATED, num_attention_heads=2)
    b = of("/b", gated_shapes(), **GATED, num_attention_heads=4)
    plan = make_plan(load_recipe(EXPERTS), {ModelReference.parse(c.reference): c for c in (a, b)})
    assert any("num_attention_heads: 2 in /a, 4 in /b" in warning for warning in plan.warnings)


def test_what_experts_learnt_to_work_with_is_compared() -> None:
    a = of("/a", gated_shapes(), **GATED, num_attention_heads=2, rope_theta=1e4, sliding_window=None)
    b = of("/b", gated_shapes(), **GATED, num_attention_heads=2, rope_theta=1e6, sliding_window=16)
    plan = make_plan(load_recipe(EXPERTS), {ModelReference.parse(c.reference): c for c in (a, b)})
    for said in ("rope_theta: 10000.0 in /a, 1000000.0 in /b", "sliding_window: None in /a, 16 in /b"):
        assert any(said in warning for warning in plan.warnings)


def test_modules_without_the_layers_are_not_compared() -> None:
    shapes = llama_shapes(2) | {"vision.proj.weight": (4, 4)}
    text = """
base_model: /a
merge_method: passthrough
modules:
  model: {slices: [{sources: [{model: /a, layer_range: [0, 2]}]}]}
  lm_head: {models: [{model: /a}]}
  vision: {models: [{model: /b}]}
"""
    a, b = of("/a", shapes, num_attention_heads=4), of("/b", shapes, num_attention_heads=2)
    assert not plan_of(text, a, b).warnings
    both = text.replace("[{sources: [{model: /a", "[{sources: [{model: /b")
    assert refusal(both, a, b) == ["num_attention_heads: 4 in /a, 2 in /b"]


def test_the_models_of_an_adapter() -> None:
    opened = {ModelReference.parse(c.reference): c for c in (model("/a", **HEADS), model("/b", num_attention_heads=2))}
    base, tuned = models_of(opened).values()
    with pytest.raises(ModelError, match="num_attention_heads: 4 in /a, 2 in /b"):
        check_pair(base, tuned)
    [warning] = check_pair(base, tuned, allow_conflicts=True)
    assert warning.endswith("num_attention_heads: 4 in /a, 2 in /b; the adapter is loaded with the config.json of /a")


def test_whether_conflicts_are_allowed_does_not_change_the_plan() -> None:
    a, b = model("/a", **HEADS), model("/b", **HEADS)
    assert plan_anyway(LINEAR, a, b).digest == plan_of(LINEAR, a, b).digest
