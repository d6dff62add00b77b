"""The ways that mergekit writes a model, wherever one may stand, and recipes that it wrote itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ConfigError

FORMS: dict[str, tuple[Any, str]] = {
    "path": ({"path": "org/m"}, "org/m"),
    "path and revision": ({"path": "org/m", "revision": "v1"}, "org/m@v1"),
    "model": ({"model": {"path": "org/m"}}, "org/m"),
    "all that mergekit writes": (
        {"model": {"path": "org/m", "revision": "v1"}, "lora": None, "override_architecture": None},
        "org/m@v1",
    ),
    "a LoRA": (
        {"model": {"path": "org/m", "revision": "v1"}, "lora": {"path": "org/l", "revision": "v2"}},
        "org/m@v1+org/l@v2",
    ),
    "a LoRA, all that mergekit writes": (
        {
            "model": {"path": "org/m", "revision": None},
            "lora": {"path": "org/l", "revision": None},
            "override_architecture": "LlamaForCausalLM",
        },
        "org/m+org/l",
    ),
    "a name and a LoRA": ({"model": "org/m@v1", "lora": "org/l@v2"}, "org/m@v1+org/l@v2"),
}
HOLE = "org/hole"
TWO = [{"model": "org/b", "parameters": {"weight": 1}}]
LINEAR = {"merge_method": "linear", "models": TWO}
MOE = {"base_model": "org/b", "gate_mode": "random", "experts": [{"source_model": "org/b"}]}
PLACES: dict[str, dict[str, Any]] = {
    "a model": {**LINEAR, "models": [*TWO, {"model": HOLE, "parameters": {"weight": 1}}]},
    "a source": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": HOLE, "layer_range": [0, 2]}]}],
    },
    "a module": {"merge_method": "passthrough", "modules": {"text": {"models": [{"model": HOLE}]}}},
    "base_model": {**LINEAR, "merge_method": "task_arithmetic", "base_model": HOLE},
    "base_model of a slice": {
        "merge_method": "task_arithmetic",
        "slices": [
            {
                "base_model": HOLE,
                "sources": [{"model": "org/b", "layer_range": [0, 2], "parameters": {"weight": 1}}],
            }
        ],
    },
    "from": {
        **LINEAR,
        "models": [*TWO, {"model": HOLE, "parameters": {"weight": 1}}],
        "exclude": "lm_head.*",
        "from": HOLE,
    },
    "tokenizer_source": {**LINEAR, "tokenizer_source": HOLE},
    "tokenizer": {**LINEAR, "tokenizer": {"source": HOLE}},
    "a token": {**LINEAR, "tokenizer": {"tokens": {"<s>": {"source": HOLE}}}},
    "a model's token": {
        **LINEAR,
        "tokenizer": {"tokens": {"<s>": {"source": {"kind": "model_token", "model": HOLE, "token_id": 3}}}},
    },
    "base_model of a mixture": {**MOE, "base_model": HOLE},
    "an expert": {**MOE, "experts": [{"source_model": "org/b"}, {"source_model": HOLE}]},
    "a shared expert": {**MOE, "shared_experts": [{"source_model": HOLE}]},
    "a backbone": {**MOE, "backbone": {"merge_method": "passthrough", "models": [{"model": HOLE}]}},
    "a stage": {
        "stages": [
            {"name": "x", "merge_method": "passthrough", "models": [{"model": HOLE}]},
            {**LINEAR, "models": [*TWO, {"model": "x", "parameters": {"weight": 1}}]},
        ]
    },
}


def with_model(place: str, model: Any) -> Any:
    return json.loads(json.dumps(PLACES[place]).replace(json.dumps(HOLE), json.dumps(model)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_each_form_means_the_same_in_each_place(place: str, form: str) -> None:
    mapping, text = FORMS[form]
    recipe = load_recipe(with_model(place, mapping), on_warning=lambda _: None)
    assert recipe == load_recipe(with_model(place, text))
    assert text in json.dumps(recipe.to_data())


@pytest.mark.parametrize("form", [{"path": "x"}, {"model": {"path": "x"}, "lora": None}])
def test_a_stage_may_be_named_by_a_mapping(form: Any) -> None:
    data = with_model("a stage", "org/m")
    as_text = load_recipe(data)
    data["stages"][1]["models"][1]["model"] = form
    assert load_recipe(data) == as_text


# Written by mergekit 0.1.5 into its outputs: by mergekit-multi for two stages, and what mergekit-moe was given.
WRITTEN_FIRST = """\
dtype: float32
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: /models/a
        parameters:
          weight: 0.5
      - layer_range: [0, 4]
        model:
          lora: null
          model:
            path: /models/b
          override_architecture: LlamaForCausalLM
        parameters:
          weight: [0.2, 0.8]
"""
WRITTEN_LAST = """\
base_model: /models/between/x
dtype: float32
merge_method: slerp
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: /models/between/x
      - layer_range: [0, 4]
        model: /models/c
parameters:
  t:
  - filter: self_attn
    value: [0, 1]
  - value: 0.3
tokenizer:
  tokens:
    a:
      force: true
      source: /models/c
    the:
      source:
        kind: model_token
        model: /models/c
        token_id: 5
"""
WRITTEN_MIXTURE = """\
base_model: /models/a
gate_mode: random
dtype: float32
experts:
- source_model: /models/a
  positive_prompts: [""]
- source_model: {model: {path: /models/b}}
  positive_prompts: [""]
"""


def test_what_mergekit_wrote_into_its_outputs_is_read() -> None:
    models = [
        [str(each) for each in load_recipe(text, on_warning=lambda _: None).model_references()]
        for text in (WRITTEN_FIRST, WRITTEN_LAST, WRITTEN_MIXTURE)
    ]
    assert models == [["/models/a", "/models/b"], ["/models/between/x", "/models/c"], ["/models/a", "/models/b"]]
    last = load_recipe(WRITTEN_LAST)
    assert isinstance(last, DenseRecipe)
    assert last.vocabulary is not None
    assert last.vocabulary.model_references() == (ModelReference("/models/c"),)


@pytest.mark.parametrize(
    ("text", "line", "path", "what", "hint"),
    [
        (
            "merge_method: passthrough\nmodels:\n  - model: org/a\n    revision: v1\n",
            4,
            "models[0].revision",
            "unknown key 'revision'",
            "write `model: NAME@v1`",
        ),
        (
            "base_model: org/a\ngate_mode: random\nexperts:\n  - source_model: org/a\n    lora: org/l\n",
            5,
            "experts[0].lora",
            "unknown key 'lora'",
            "write `source_model: NAME+org/l`",
        ),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\nmodels: [{model: b}]\nrevision: v1\n",
            5,
            "revision",
            "unknown key 'revision'",
            "write `base_model: NAME@v1`",
        ),
        (
            "merge_method: passthrough\nmodels:\n  - model: 7\n",
            3,
            "models[0].model",
            "expected a model such as org/name, a folder or s3://bucket/prefix, found 7",
            "quote it",
        ),
        (
            "merge_method: passthrough\nmodels:\n  - model: a\ntokenizer: union\n",
            4,
            "tokenizer",
            "expected a mapping, found 'union'",
            "write `tokenizer: {source: union}`",
        ),
        (
            "merge_method: nuslerp\nbase_model: a\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n",
            4,
            "models",
            "takes exactly 2 models beside the base model, found 1",
            "or remove `base_model` if a is to be merged itself",
        ),
        (
            "merge_method: slerp\nbase_model: a\nslices:\n  - sources:\n      - {model: a, layer_range: [0, 4]}\n"
            "      - {model: b, layer_range: [0, 4], parameters: {t: 0.3}}\n",
            6,
            "slices[0].sources[1].parameters.t",
            "once for all models",
            "in the recipe or the slice",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels:\n"
            "  - {model: a, parameters: {t: 0}}\n  - {model: b, parameters: {t: 1}}\n",
            4,
            "models[0].parameters.t",
            "slerp needs the parameter 't' once for all models, and does not take it from one",
            "in the recipe or the slice",
        ),
    ],
)
def test_what_a_model_cannot_say_gets_a_hint(text: str, line: int, path: str, what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(text)
    (problem,) = caught.value.problems
    assert (problem.where, problem.path) == (f"<text>:{line}", path)
    assert what in problem.what
    assert hint in problem.hint
