"""The JSON Schema of recipes is current, accepts what we accept, and refuses what is misspelt."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped] # its stubs are a package of their own
import pytest
import yaml

import mergekit_ray
from docs import recipe_schema

ROOT = Path(__file__).parents[2]


def test_the_schema_of_recipes_is_current() -> None:
    """Methods that were added since may be missing, since a method is one file; `--check` insists on them."""
    text = recipe_schema.FILE.read_text()
    methods = json.loads(text)["$defs"]["DenseRecipe"]["properties"]["merge_method"]["enum"]
    assert text == recipe_schema.text(methods), "run `python docs/recipe_schema.py`"


SCHEMA = jsonschema.Draft202012Validator(json.loads(recipe_schema.FILE.read_text()))


@pytest.mark.parametrize("recipe", [*sorted((ROOT / "configs").glob("*.yml")), ROOT / "demo/recipe.yml"], ids=str)
def test_the_schema_accepts_our_recipes(recipe: Path) -> None:
    text = recipe.read_text()
    SCHEMA.validate(yaml.safe_load(text))
    assert recipe.parent.name != "configs" or text.startswith(f"# yaml-language-server: $schema={recipe_schema.URL}\n")


SETTINGS = [
    "0.5",
    "true",
    "yes",
    "1e-5",
    "'0.5'",
    "[0, 0.5, 1]",
    "{filter: mlp, value: 1}",
    "[{filter: self_attn, value: [0, 1]}, {filter: '*', value: 0.5}, {value: 1}]",
    "null",
]
MODELS = ["org/a@v1+org/b", "{path: org/a, revision: v1, lora: {path: ./b}}", "{model: {path: org/a}, lora: org/b}"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_schema_accepts_every_form_of_a_setting(setting: str) -> None:
    SCHEMA.validate(
        yaml.safe_load(f"{{merge_method: ties, models: [{{model: a, parameters: {{weight: {setting}}}}}]}}")
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_schema_accepts_every_form_of_a_model(model: str) -> None:
    text = f"merge_method: linear\nmodels: [{{model: {model}, parameters: {{weight: 1}}}}]\n"
    mergekit_ray.load_recipe(text)
    SCHEMA.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "line",
    [
        "base_modle: org/base",
        "output: {path: x, max_shard: 2GB}",
        "parameters: {densty: 0.5}",
        "parameters: {density: [{filter: mlp, valu: 1}]}",
        "parameters: {density: x}",
        "parameters: {density: [0.5, x]}",
        "parameters: {density: [{filter: mlp, value: 0.5x}]}",
        "dtype: bfloat61",
        "missing: ignore",
        "base_model: {path: org/base, lorra: x}",
    ],
)
@pytest.mark.parametrize("recipe", ["ties", "moe"])
def test_the_schema_refuses_what_is_misspelt(recipe: str, line: str) -> None:
    data = yaml.safe_load((ROOT / f"configs/{recipe}.yml").read_text())
    assert not SCHEMA.is_valid(data | yaml.safe_load(line))
