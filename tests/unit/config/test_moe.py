from __future__ import annotations

from typing import Any

import pytest
import yaml

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import GateMode, MoeRecipe
from mergekit_ray.core.errors import ConfigError, Problem
from support.declared_methods import Methods

MOE = """\
base_model: org/base
gate_mode: hidden
experts:
  - source_model: org/a
    positive_prompts: [code]
    negative_prompts: [chat]
    noise_scale: 1
    residual_scale: 0.1
  - source_model: org/b
    positive_prompts: chat
"""


def load(text: str, methods: Methods) -> MoeRecipe:
    recipe = load_recipe(text, methods=methods)
    assert isinstance(recipe, MoeRecipe)
    assert load_recipe(recipe.to_data(), methods=methods) == recipe
    return recipe


def test_all_keys(methods: Methods) -> None:
    extra = """\
merge_method: moe
name: x
architecture: qwen2_moe
experts_per_token: 1
expert_layout: packed
shared_experts:
  - {source_model: org/c, positive_prompts: [any], residual_scale: 0.1}
backbone:
  merge_method: linear
  models: [{model: org/a, parameters: {weight: 1}}, {model: org/d, parameters: {weight: 1}}]
dtype: bf16
seed: 3
output: ./out
"""
    recipe = load(MOE + extra, methods)
    assert recipe.gate_mode is GateMode.HIDDEN
    assert recipe.experts[0].noise_scale == 1.0
    assert recipe.experts[1].positive_prompts == ("chat",)
    assert recipe.num_active == 1
    assert [str(m) for m in recipe.model_references()] == ["org/base", "org/a", "org/b", "org/c", "org/d"]
    assert recipe.backbone is not None


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_routers_need_no_prompts(mode: str, methods: Methods) -> None:
    text = f"base_model: x\ngate_mode: {mode}\nexperts: [{{source_model: x}}, {{source_model: x}}]\n"
    assert load(text, methods).num_active == 2


def test_identical_experts_are_accepted_where_the_recipe_says_so(methods: Methods) -> None:
    text = (
        "base_model: x\nallow_identical_experts: true\nexperts:\n"
        + "  - {source_model: x, positive_prompts: [a]}\n" * 2
    )
    assert len(load(text, methods).experts) == 2


def test_one_expert_uses_one(methods: Methods) -> None:
    assert load("base_model: x\nexperts: [{source_model: x, positive_prompts: [a]}]\n", methods).num_active == 1


SAME = "base_model: x\nexperts:\n" + "  - {source_model: %s, positive_prompts: [%s]}\n" * 2


@pytest.mark.parametrize(
    ("text", "line", "path", "what", "hint"),
    [
        (
            MOE.replace("gate_mode: hidden", "gate_mode: hiden"),
            2,
            "gate_mode",
            "accepted: hidden, hidden_avg",
            "'hidden'",
        ),
        (MOE.replace("    positive_prompts: chat\n", ""), 9, "experts[1].positive_prompts", "no `pos", "random"),
        (MOE.replace("[code]", "[42]"), 5, "experts[0].positive_prompts", "prompt 1 is not text but 42", "quote it"),
        (MOE.replace("noise_scale: 1", "noise_scale: -1"), 7, "experts[0].noise_scale", "found -1", ""),
        (
            MOE.replace("positive_prompts: chat", "postive_prompts: chat"),
            10,
            "experts[1].postive_prompts",
            "",
            "'positive_prompts'",
        ),
        (
            MOE.replace("  - source_model: org/b", "  - source_modle: org/b"),
            9,
            "experts[1].source_modle",
            "",
            "'source_model'",
        ),
        (MOE + "experts_per_token: 3\n", 11, "experts_per_token", "cannot use 3 experts of 2", "1 to 2"),
        (MOE + "experts_per_token: 0\n", 11, "experts_per_token", "found 0", ""),
        (MOE + "merge_method: linear\n", 11, "merge_method", "takes `merge_method: moe` or none, found 'linear'", ""),
        (MOE + "expert_layout: pakced\n", 11, "expert_layout", "accepted: separate, packed", "'packed'"),
        (
            MOE + "shared_experts:\n  - {source_model: a}\n  - {source_model: b}\n",
            13,
            "shared_experts[1]",
            "at most one",
            "experts",
        ),
        (MOE + "models: [{model: a}]\n", 11, "models", "two kinds of recipe", "backbone"),
        (MOE.replace("base_model: org/base\n", ""), 1, "base_model", "'base_model' is missing", "org/name"),
        ("base_model: x\nexperts: []\n", 2, "experts", "an empty list", ""),
        ("base_model: x\nmerge_method: moe\n", 1, "experts", "'experts' is missing", "source_model"),
        ("base_model: x\ngate_mode: random\nexpert: [{source_model: a}]\n", 3, "expert", "unknown key", "'experts'"),
        (SAME % ("a", "p", "b", "p"), 2, "experts", "the same prompts", "allow_identical_experts: true"),
        (SAME % ("a", "p", "a", "q"), 2, "experts", "all experts are a", "allow_identical_experts: true"),
        (
            f"{MOE}backbone:\n  merge_method: ties\n  base_model: b\n  models:\n"
            "    - {model: a, parameters: {wieght: 1}}\n",
            15,
            "backbone.models[0].parameters.wieght",
            "ties has no parameter",
            "'weight'",
        ),
        (MOE + "backbone: {merge_method: linear}\n", 11, "backbone", "nothing to merge", ""),
    ],
)
def test_one_problem_one_message(text: str, line: int, path: str, what: str, hint: str, methods: Methods) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(text, methods=methods)
    (problem,) = caught.value.problems
    assert (problem.where, problem.path) == (f"<text>:{line}", path)
    assert what in problem.what
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts_per_token": 5}, "cannot use 5 experts of 2"),
        ({"backbone": {"merge_method": "linear"}}, "nothing to merge"),
    ],
)
def test_checks_across_fields_hold_in_python_too(change: dict[str, Any], words: str) -> None:
    data = yaml.safe_load(MOE) | {"experts": [{"source_model": m, "positive_prompts": [m]} for m in "ab"]}
    MoeRecipe.model_validate(data)
    with pytest.raises(ValueError, match=words):
        MoeRecipe.model_validate(data | change)


def test_an_empty_prompt_is_a_warning(methods: Methods) -> None:
    told: list[Problem] = []
    load_recipe(MOE.replace("[code]", "['a', ' ', '']"), methods=methods, on_warning=told.append)
    assert [(each.where, each.path) for each in told] == [
        ("<text>:5", f"experts[0].positive_prompts[{number}]") for number in (1, 2)
    ]
    assert all("this prompt is empty" in each.what for each in told)
