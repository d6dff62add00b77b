"""Recipes in the forms of published model cards load, or are refused with a sentence their author would agree with.

``public/*.txt`` has a recipe below each line ``=== what it is``. What follows ``!!`` is in the message that refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_ray.config.load import Recipe, load_recipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ConfigError, Problem

LINEAR = "merge_method: linear\nmodels: [{model: o/a, parameters: {weight: 1}}]\n"
FOLDER = Path(__file__).with_name("public")
HEAD = re.compile(r"^=== (.+)\n", re.MULTILINE)


def cases() -> dict[str, tuple[str, str]]:
    """What each recipe is: its text, and what is said of it if it is refused."""
    found = {}
    for file in sorted(FOLDER.glob("*.txt")):
        parts = HEAD.split(file.read_text())[1:]
        for head, text in zip(parts[::2], parts[1::2], strict=True):
            what, _, refused = head.partition(" !! ")
            assert what not in found
            found[what] = text, refused
    return found


CASES = cases()
LOADED = [what for what, (_, refused) in CASES.items() if not refused]
REFUSED = [what for what, (_, refused) in CASES.items() if refused]


WARNED = {
    "dare_ties": ["parameters.int8_mask", "random_seed"],
    "linear with a name for each model": ["models[0].name", "models[1].name"],
    "linear with dtype among the parameters": ["parameters.dtype", "parameters.int8_mask"],
    "model_stock with weights that mean nothing": [
        *("models[0].parameters.density", "models[0].parameters.weight"),
        *("parameters.int8_mask", "parameters.normalize"),
    ],
    "prompts that are empty": ["experts[0].positive_prompts[0]", "experts[1].negative_prompts[0]"],
    "slerp with ranges written one item a line": ["embed_slerp"],
}
"""What some of them say without effect."""


def load(text: str | bytes) -> tuple[Recipe, list[Problem]]:
    warned: list[Problem] = []
    return load_recipe(text, on_warning=warned.append), warned


def test_there_are_many() -> None:
    assert len(CASES) >= 80


@pytest.mark.parametrize("what", LOADED)
def test_it_loads_and_says_the_same_in_our_words(what: str) -> None:
    recipe, _ = load(CASES[what][0])
    assert load(recipe.to_yaml())[0] == recipe


@pytest.mark.parametrize(("what", "paths"), WARNED.items())
def test_what_has_no_effect_is_said(what: str, paths: list[str]) -> None:
    assert sorted({problem.path for problem in load(CASES[what][0])[1]}) == paths


@pytest.mark.parametrize("base", ["//home/user/models/alpha", "/home/user//models/alpha/"])
def test_a_folder_is_the_same_however_many_slashes_it_has(base: str) -> None:
    recipe, _ = load(CASES["slerp whose base has a doubled slash"][0].replace("//home/user/models/alpha", base))
    assert isinstance(recipe, DenseRecipe)
    assert recipe.models is not None
    assert recipe.base_model == recipe.models[0].model
    assert str(ModelReference.parse("s3://bucket//key")) == "s3://bucket//key"


@pytest.mark.parametrize("what", LOADED)
def test_editors_of_any_system_may_write_it(what: str) -> None:
    text = CASES[what][0]
    expected = load(text)
    of_windows = text.replace("\n", "\r\n").encode("utf-8-sig")
    spaced = re.sub(r"(?<=[^|\s-])$", "  \t", text, flags=re.MULTILINE) if "|" not in text else text
    for changed in (of_windows, spaced, text.rstrip("\n") + "\n\n# made by hand\n"):
        assert load(changed)[0] == expected[0]


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_words_that_name_the_fault(what: str) -> None:
    text, said = CASES[what]
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert said in str(caught.value)
    assert all(problem.hint or re.search("accepted|expected", problem.what) for problem in caught.value.problems)


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
            "choose nuslerp",
        ),
        ("merge_method: linear\nmodels: [{model: o/a}\ndtype: bfloat16\n", "the '[' is not closed"),
        (LINEAR + "merge_method_args: {}\n", "unknown key"),
    ],
)
def test_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(text, on_warning=lambda _: None)
    assert said in str(caught.value)
