"""A recipe arrives in the pods as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from helm.charts import CASES, GIVEN, Manifest, render, rendered, values_of
from mergekit_ray.config.load import load_recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yml"))


def recipe_in(manifests: list[Manifest] | tuple[Manifest, ...]) -> str:
    [found] = [each["data"]["recipe.yml"] for each in manifests if "recipe.yml" in each.get("data", {})]
    return str(found)


@pytest.mark.parametrize("case", [case for case in CASES if "content" in values_of(case)["recipe"]])
def test_recipes_of_the_sets_of_values_are_recipes(case: str) -> None:
    text = recipe_in(rendered(case))
    assert text == values_of(case)["recipe"]["content"]
    load_recipe(text)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_example_recipes(config: Path) -> None:
    text = config.read_text()
    manifests = render({**GIVEN, "recipe": {"content": text}})
    assert recipe_in(manifests) == text
    assert load_recipe(recipe_in(manifests)) == load_recipe(config)


@pytest.mark.parametrize("text", ["# {{ .Values }} of Helm\na: 1\n", "no: line break", "tab:\t1\r\n\n\nend: ' #'\n"])
def test_text_is_not_touched(text: str) -> None:
    assert recipe_in(render({**GIVEN, "recipe": {"content": text}})) == text
