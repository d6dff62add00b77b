from __future__ import annotations

from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.core.errors import ConfigError
from support.declared_methods import Methods, declared_methods

METHODS: Methods = declared_methods()

KEYS = [
    *DenseRecipe.model_fields,
    *MoeRecipe.model_fields,
    *(
        "model",
        "layer_range",
        "sources",
        "source_model",
        "weight",
        "density",
        "t",
        "filter",
        "value",
        "path",
        "revision",
    ),
    *("lora", "positive_prompts", "kind", "source", "tokens", "max_shard_size", "wieght", "text"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([10**400, 10**4000, float("nan"), float("inf"), 0.5, 1e308])
    | st.sampled_from(
        ["linear", "ties", "slerp", "passthrough", "moe", "a", "org/b@main", "a+b", "bfloat16", "1e-3", ""]
    )
    | st.sampled_from(["random", "hidden", "union", "2GB", "zero", "model_token", "*", "mlp"])
    | st.text(max_size=5)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["weight", "density", "t", "lambda", "normalize", "wieght"]), TREES, max_size=2
)


def maybe(key: str, value: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.just({}) | value.map(lambda found: {key: found}) | TREES.map(lambda found: {key: found})


def together(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


MODEL = together(maybe("model", st.sampled_from(["a", "b", "c"])), maybe("parameters", PARAMETERS))
SOURCE = together(MODEL, maybe("layer_range", st.lists(st.integers(0, 4), min_size=2, max_size=2)))
SLICE = together(maybe("sources", st.lists(SOURCE, max_size=3)), maybe("parameters", PARAMETERS))
EXPERT = together(
    maybe("source_model", st.sampled_from(["a", "b"])), maybe("positive_prompts", st.lists(st.text(max_size=2)))
)
RECIPE = together(
    maybe("merge_method", st.sampled_from(["linear", "ties", "slerp", "passthrough", "nuslerp", "moe", "tise"])),
    maybe("base_model", st.sampled_from(["a", "b"])),
    maybe("models", st.lists(MODEL, max_size=3)) | maybe("slices", st.lists(SLICE, max_size=3)),
    maybe("modules", st.dictionaries(st.text(max_size=3), maybe("models", st.lists(MODEL, max_size=2)), max_size=2)),
    maybe("parameters", PARAMETERS),
    maybe("experts", st.lists(EXPERT, max_size=3)),
    st.dictionaries(st.sampled_from(KEYS), TREES, max_size=2),
)


def check(source: Any, lenient: bool) -> None:
    try:
        recipe = load_recipe(source, lenient=lenient, on_warning=str, methods=METHODS)
    except ConfigError as error:
        told = str(error)
    else:
        check_sound(recipe)
        return
    assert told


def check_sound(recipe: DenseRecipe | MoeRecipe) -> None:
    assert load_recipe(recipe.to_data(), on_warning=str, methods=METHODS) == recipe
    for reference in recipe.model_references():
        assert "stand-in" not in str(reference)
    if isinstance(recipe, DenseRecipe):
        assert all(piece.inputs for module in normalise(recipe, METHODS) for piece in module.slices)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(RECIPE | TREES | st.dictionaries(st.integers() | st.text(max_size=3), TREES, max_size=3), st.booleans())
def test_any_mapping_is_a_sound_recipe_or_a_config_error(data: Any, lenient: bool) -> None:
    check(data, lenient)


@FUZZ
@given(RECIPE, st.booleans())
def test_any_yaml_is_a_sound_recipe_or_a_config_error(data: Any, lenient: bool) -> None:
    check(yaml.safe_dump(data) + "\n", lenient)


@FUZZ
@given(st.text(max_size=120), st.booleans())
def test_any_text_is_a_sound_recipe_or_a_config_error(text: str, lenient: bool) -> None:
    check(text, lenient)


def test_a_number_that_python_will_not_print() -> None:
    huge = 10**5000
    for key in (
        "seed",
        "dtype",
        "name",
        "base_model",
        "merge_method",
        "output",
        "parameters",
        "models",
        "compute_dtype",
    ):
        check({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": huge}}], key: huge}, False)
    check({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, huge]}]}]}, False)
