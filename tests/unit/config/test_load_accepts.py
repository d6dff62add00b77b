from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_ray.config.fields import ComputeDType
from mergekit_ray.config.load import RecipeWarning, check_recipe, load_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Resolver
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, Problem
from support.declared_methods import Methods

ROOT = Path(__file__).parents[3]
HEAD = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"


def load(source: Any, methods: Methods) -> DenseRecipe:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load_recipe(source, methods=methods)
    assert isinstance(recipe, DenseRecipe)
    return recipe


def test_one_recipe_five_ways(tmp_path: Path, methods: Methods) -> None:
    file = tmp_path / "my recipe.yml"
    file.write_text("\ufeff" + HEAD, encoding="utf-8")
    plain = tmp_path / "recipe"
    plain.write_text(HEAD)
    one_line = "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}"
    recipes = [load(s, methods) for s in (HEAD, file, str(file), str(plain), one_line, yaml.safe_load(HEAD))]
    recipes.append(load(recipes[0], methods))
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize("missing", ["error", "base", "first", "drop"])
def test_tensors_that_are_not_merged(missing: str, methods: Methods) -> None:
    recipe = load(f"missing: {missing}\nexclude: lm_head.*\ninclude: [a, 'b*']\nfrom: a\n{HEAD}", methods)
    assert (recipe.missing, recipe.exclude, recipe.include) == (missing, ("lm_head.*",), ("a", "b*"))
    assert recipe.from_model == ModelReference("a")
    assert recipe.to_data()["from"] == "a"
    assert load(recipe.to_data(), methods) == recipe
    assert not {"missing", "exclude", "include", "from"} & load(HEAD, methods).to_data().keys()


def test_every_key(methods: Methods) -> None:
    text = """\
name: 7
merge_method: ties
base_model: {model: {path: org/base, revision: main}}
dtype: torch.bfloat16
out_dtype: fp16
compute_dtype: float64
seed: 9
chat_template: chatml
tokenizer:
  source: org/base
  pad_to_multiple_of: 64
  tokens:
    <pad>: {source: {kind: zero}}
    <a>: {source: {kind: model_token, model: org/a, token_id: 3}, force: true}
    <b>: {source: org/a}
modules:
  text_decoder:
    slices:
      - sources:
          - {model: org/a, layer_range: [0, 8], parameters: {weight: [0, 1]}}
          - {model: org/base@main, layer_range: [2.0, "10"]}
        parameters: {density: [{filter: mlp, value: [1, 0.5]}, {value: 0.1}]}
    parameters: {lambda: 0.5}
  vision:
    models: [{model: ./my model, parameters: {weight: 1e-3}}]
parameters: {normalize: "true"}
output: {path: s3://bucket/out, max_shard_size: 5GiB}
"""
    recipe = load(text, methods)
    assert recipe.name == "7"
    assert (recipe.dtype, recipe.out_dtype, recipe.compute_dtype) == (DType.BF16, DType.F16, ComputeDType.FLOAT64)
    assert (recipe.output.path, recipe.output.max_shard_size, recipe.seed) == ("s3://bucket/out", 5 << 30, 9)
    assert [str(model) for model in recipe.model_references()] == ["org/base@main", "org/a", "./my model"]
    assert recipe.donor == ModelReference("org/base", "main")
    assert recipe.tokenizer is not None
    assert recipe.modules is not None
    assert recipe.modules["text_decoder"].slices is not None
    assert recipe.modules["text_decoder"].slices[0].sources[1].layer_range == (2, 10)
    assert load(recipe.to_data(), methods) == recipe
    assert load(yaml.safe_dump(recipe.to_data()), methods) == recipe


@pytest.mark.parametrize("word", ["union", "base"])
def test_tokenizer_source_words_and_models(word: str, methods: Methods) -> None:
    assert load(HEAD + f"tokenizer_source: {word}\n", methods).tokenizer_source == word
    for text in ("org/a", "model:org/a", "{model: {path: org/a}}"):
        assert load(HEAD + f"tokenizer_source: {text}\n", methods).tokenizer_source == ModelReference("org/a")


@pytest.mark.parametrize(
    "text",
    [
        HEAD.replace("weight: 1", "weight: [1.0]"),
        HEAD.replace("weight: 1", "weight: true"),
        HEAD.replace("weight: 1", "weight: '1e0'"),
        HEAD.replace("weight: 1", "weight: [1, 1]"),
        HEAD.replace("weight: 1", "weight: {value: 1}"),
        HEAD.replace("weight: 1", "weight: [{filter: '*', value: [1]}]"),
        HEAD + "parameters: {normalize: 1.0}\n",
        HEAD + "parameters: {normalize: yes}\n",
        HEAD + "parameters: {normalize: [true]}\n",
        HEAD
        + "parameters: ~\nslices:\ndtype: null\nseed: ~\nname:\noutput: ~\ncompute_dtype: ~\ntokenizer_source: ~\n",
        "merge_method: linear\nmodels:\n  - {model: a, parameters: ~}\nparameters: {weight: 1}\n",
        "merge_method: linear\nparameters: &x {weight: 1}\nmodels:\n  - {model: a, parameters: *x}\n",
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {<<: &x {weight: 1}}}\nparameters: *x\n",
    ],
)
def test_untidy_spellings_of_one_recipe_plan_the_same(text: str, methods: Methods) -> None:
    (module,) = normalise(load(text, methods), methods)
    (piece,) = module.slices
    (source,) = piece.inputs
    method = methods.get("linear")
    assert Resolver(method.model_parameters, source.levels).at("model.norm.weight", 0.0) == {"weight": 1.0}
    assert Resolver(method.global_parameters, piece.levels).at("model.norm.weight", 0.0) == {"normalize": True}


@pytest.mark.parametrize(
    "text",
    [
        "parameters: {t: 0.5}\nmodels: [{model: a}, {model: b}]\n",
        "models: [{model: b}]\nparameters: {t: 0.5}\n",
        "slices:\n - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]\n"
        "   parameters: {t: 0.5}\n",
        "modules: {text: {models: [{model: a}, {model: b}], parameters: {t: 0.5}}}\n",
    ],
)
def test_t_may_stand_at_any_level_but_beside_a_model(text: str, methods: Methods) -> None:
    recipe = load("merge_method: slerp\nbase_model: a\n" + text, methods)
    (module,) = normalise(recipe, methods)
    (piece,) = module.slices
    assert [str(source.model) for source in piece.inputs] == ["b"]
    assert next(level["t"] for level in piece.levels if "t" in level) == 0.5


@pytest.mark.parametrize(
    "cases",
    [
        "{filter: mlp.up_proj, value: 1}, {filter: mlp, value: 2}, {value: 3}",
        "{filter: '*.mlp.*', value: 1}, {filter: mlp, value: 2}, {value: 3}",
        "{filter: l, value: 1}, {filter: '*.[mlp]*', value: 2}, {value: 3}",
        "{filter: up_proj, value: 1}, {filter: down_proj, value: 2}",
    ],
)
def test_filters_that_may_apply_are_no_warning(cases: str, methods: Methods) -> None:
    assert not warnings_of(HEAD.replace("weight: 1", f"weight: [{cases}]"), methods)


def test_a_base_listed_twice_needs_no_weight(methods: Methods) -> None:
    text = (
        "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}, {model: a%s}]\n"
    )
    for parameters in ("", ", parameters: {weight: 2}"):
        (module,) = normalise(load(text % parameters, methods), methods)
        assert [str(source.model) for source in module.slices[0].inputs] == ["b"]


def warnings_of(text: str, methods: Methods, **options: Any) -> list[tuple[str, str, str]]:
    told: list[Problem] = []
    load_recipe(text, on_warning=told.append, methods=methods, **options)
    return [(problem.where, problem.path, problem.what) for problem in told]


@pytest.mark.parametrize(
    ("text", "line", "path", "words"),
    [
        (HEAD + "parameters: {int8_mask: true}\n", 4, "parameters.int8_mask", "no effect on linear"),
        (HEAD + "parameters: {dtype: float16}\n", 4, "parameters.dtype", "write it in the recipe"),
        (HEAD + "parameters: {random_seed: 3}\n", 4, "parameters.random_seed", "write `seed` in the recipe"),
        (HEAD + "parameters: {density: 0.5}\n", 4, "parameters.density", "no effect on linear: it is a parameter of "),
        (
            HEAD.replace("weight: 1", "weight: 1, lambda: 2") + "parameters: {lambda: 3}\n",
            4,
            "parameters.lambda",
            "no effect on linear: it is a parameter of ",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels:\n  - model: b\n",
            3,
            "models",
            "ties of no model beside the base model is the base model, b",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 1]}]\n"
            "    residual_weight: 0.5\n",
            4,
            "slices[0].residual_weight",
            "no effect",
        ),
        (
            "merge_method: passthrough\nslices:\n  - base_model: b\n    sources: [{model: a, layer_range: [0, 1]}]\n",
            3,
            "slices[0].base_model",
            "works without a base",
        ),
        (
            HEAD.replace("model: a", "model: {model: a, override_architecture: X}"),
            3,
            "models[0].model.override_architecture",
            "no effect",
        ),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\nmodels:\n  - {model: b, parameters: {t: 1}}\n",
            5,
            "models[0].parameters.t",
            "no effect beside a model",
        ),
        (
            "merge_method: linear\nmodels:\n  - {model: b, parameters: {weight: 1, normalize: false}}\n",
            3,
            "models[0].parameters.normalize",
            "no effect beside a model: linear has one for all models",
        ),
        (
            HEAD.replace("weight: 1", "weight: [{filter: mlp, value: 1}, {value: 2}, {filter: norm, value: 3}]"),
            3,
            "models[0].parameters.weight[2]",
            "never applies: an entry without `filter` stands before it",
        ),
        (
            HEAD.replace("weight: 1", "weight: [{filter: mlp, value: 1}, {filter: mlp.up_proj, value: 2}, {value: 3}]"),
            3,
            "models[0].parameters.weight[1]",
            "never applies: the filter 'mlp' stands before it",
        ),
        (
            HEAD.replace("weight: 1", "weight: [{filter: mlp, value: 1}, {filter: '*.mlp.*', value: 2}, {value: 3}]"),
            3,
            "models[0].parameters.weight[1]",
            "never applies: the filter 'mlp' stands before it",
        ),
        (
            HEAD.replace("weight: 1", "weight: [{value: 1}, {value: 2}]"),
            3,
            "models[0].parameters.weight[1]",
            "never applies",
        ),
    ],
)
def test_what_does_nothing_is_a_warning(text: str, line: int, path: str, words: str, methods: Methods) -> None:
    ((where, found_path, what),) = warnings_of(text, methods)
    assert (where, found_path) == (f"<text>:{line}", path)
    assert words in what


def test_without_a_listener_warnings_are_python_warnings_at_the_caller(methods: Methods) -> None:
    with pytest.warns(RecipeWarning, match="int8_mask") as told:
        load_recipe(HEAD + "parameters: {int8_mask: true}\n", methods=methods)
    assert told[0].filename == __file__


MOE = """\
base_model: cognitivecomputations/dolphin-2_6-phi-2
gate_mode: cheap_embed
dtype: float16
experts:
  - source_model: cognitivecomputations/dolphin-2_6-phi-2
    positive_prompts: ["chat"]
  - source_model: lxuechen/phi-2-dpo
    positive_prompts: ["code"]
"""


@pytest.mark.parametrize("merge_method", ["", "merge_method: moe\n", "merge_method: ~\n"])
def test_a_mixture_of_phi_2_loads_from_text_and_from_a_mapping(merge_method: str) -> None:
    text = MOE + merge_method
    recipes = [load_recipe(text), load_recipe(yaml.safe_load(text)), MoeRecipe.model_validate(yaml.safe_load(text))]
    for recipe in recipes:
        assert isinstance(recipe, MoeRecipe)
        assert recipe == recipes[0]
        assert recipe.merge_method == "moe"
        assert [str(expert.source_model) for expert in recipe.experts][1] == "lxuechen/phi-2-dpo"
        assert recipe.num_active == 2
    assert load_recipe(recipes[0].to_data()) == recipes[0]


def test_the_wrong_model_names_the_right_one() -> None:
    for data in (yaml.safe_load(MOE), {"merge_method": "moe"}):
        with pytest.raises(ValueError, match=r"Mixture-of-Experts recipe.*load_recipe.*MoeRecipe") as caught:
            DenseRecipe.model_validate(data)
        assert "merge_method\n  Field required" not in str(caught.value)
    with pytest.raises(ValueError, match=r"dense recipe.*load_recipe.*DenseRecipe"):
        MoeRecipe.model_validate(yaml.safe_load(HEAD))


def test_recipes_built_in_python_meet_the_same_checks(methods: Methods) -> None:
    model = {"model": "a", "parameters": {"weight": [0, "1e-3"]}}
    recipe = DenseRecipe(merge_method="linear", models=[model], base_model="b")
    check_recipe(recipe, methods=methods)
    with pytest.raises(ConfigError, match="both given"):
        DenseRecipe(merge_method="linear", models=[model], modules={"m": {"models": [model]}})
    with pytest.raises(ConfigError, match="nothing to merge"):
        DenseRecipe(merge_method="linear")
    with pytest.raises(ConfigError, match="expected a finite number"):
        DenseRecipe(merge_method="linear", models=[{"model": "a", "parameters": {"weight": float("nan")}}])
    with pytest.raises(ConfigError, match="needs a base model"):
        check_recipe(DenseRecipe(merge_method="ties", models=[model]), methods=methods)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yml")), ids=lambda file: file.stem)
def test_the_example_recipes_load_with_the_real_methods(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load_recipe(file)
    assert recipe.output.path
    assert load_recipe(recipe.to_data()) == recipe


def test_there_are_examples() -> None:
    names = {file.stem for file in (ROOT / "configs").glob("*.yml")}
    assert names >= {"linear", "slerp", "ties", "dare_ties", "task_arithmetic", "frankenmerge", "moe"}


def test_reading_a_recipe_needs_no_slow_library() -> None:
    code = (
        "import sys, mergekit_ray.config.load as c\n"
        f"c.load_recipe({HEAD!r})\n"
        "print(sorted({'torch', 'ray', 'transformers', 'boto3', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
