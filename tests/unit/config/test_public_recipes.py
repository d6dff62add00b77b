"""Recipes in the forms that model cards and tutorials have: each loads, and is the same when read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_ray.config.load import load_recipe
from mergekit_ray.core.errors import ConfigError

FOLDER = Path(__file__).with_name("recipes")
RECIPES = [
    pytest.param(part.split("\n", 1)[1], id=f"{file.stem}: {part.splitlines()[0]}")
    for file in sorted(FOLDER.glob("*.txt"))
    for part in re.split("^## ", file.read_text(), flags=re.MULTILINE)[1:]
]
LINEAR = "merge_method: linear\nmodels: [{model: o/a, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize("text", RECIPES)
def test_loads(text: str) -> None:
    recipe = load_recipe(text, on_warning=lambda _: None)
    assert load_recipe(recipe.to_yaml(), on_warning=lambda _: None) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "base_model: o/a\ngate_mode: cheap_embed\nexperts:\n"
            "- {source_model: o/a, positive_prompts: ['']}\n- {source_model: o/b, positive_prompts: ['']}\n",
            "all experts have the same prompts",
        ),
        (LINEAR.replace("o/a", "hf:me/x"), "write hf://me/x; a folder is ./hf:me/x"),
        (LINEAR.replace("o/a", "7"), "quote it"),
        (
            "merge_method: slerp\nbase_model: o/c\nmodels: [{model: o/a}, {model: o/b}]\nparameters: {t: 1}\n",
            "or choose nuslerp",
        ),
        ("merge_method: linear\nmodels: [{model: o/a}\ndtype: bfloat16\n", "the '[' is not closed"),
        (LINEAR + "merge_method_args: {}\n", "unknown key"),
    ],
)
def test_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(text, on_warning=lambda _: None)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LINEAR + "random_seed: 0\n", "random_seed has no effect: write `seed`"),
        (LINEAR + "int8_mask: true\n", "int8_mask has no effect"),
        (LINEAR.replace("weight: 1", "weight: [{value: 1}, {filter: mlp, value: 0}]"), "fits every tensor"),
        (
            LINEAR.replace(
                "weight: 1", "weight: [{filter: attn, value: 1}, {filter: self_attn, value: 0}, {value: 1}]"
            ),
            "fits all of its tensors",
        ),
    ],
)
def test_what_has_no_effect_is_a_warning(text: str, said: str) -> None:
    told: list[str] = []
    load_recipe(text, on_warning=lambda problem: told.append(str(problem)))
    assert len(told) == 1
    assert said in told[0]
