"""Recipes built in Python: what they accept is what the YAML accepts, and what is wrong is said as well."""

from __future__ import annotations

import ast
from pathlib import Path, PurePath
from typing import Any

import pytest
import yaml

from mergekit_ray.config.fields import OutputOptions, RecipeModel
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import ExpertRecipe, GateMode, MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe, InputModel, ModuleRecipe, SliceRecipe, SliceSource
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.stages import Around, StagedRecipe
from mergekit_ray.config.tokenizer import ModelTokenEmbedding, TokenEmbedding, TokenizerOptions, ZeroEmbedding
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError

ROOT = Path(__file__).parents[3]
PARTS = [
    DenseRecipe,
    ExpertRecipe,
    InputModel,
    ModelTokenEmbedding,
    ModuleRecipe,
    MoeRecipe,
    OutputOptions,
    SliceRecipe,
    SliceSource,
    StagedRecipe,
    TokenEmbedding,
    TokenizerOptions,
]


def declared(name: str) -> dict[str, bool]:
    """Arguments of the constructor that type checkers see, and whether they must be given."""
    for file in sorted((ROOT / "mergekit_ray/config").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == name:
                [init] = [
                    each for each in ast.walk(node) if isinstance(each, ast.FunctionDef) and each.name == "__init__"
                ]
                assert len(init.args.kw_defaults) == len(init.args.kwonlyargs)
                return {
                    each.arg: default is None
                    for each, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
                }
    raise AssertionError(name)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_type_checkers_see_every_field(part: type[RecipeModel]) -> None:
    assert declared(part.__name__) == {name: info.is_required() for name, info in part.model_fields.items()}


def test_every_part_is_declared() -> None:
    def below(model: type[RecipeModel]) -> set[type[RecipeModel]]:
        return {model}.union(*map(below, model.__subclasses__()))

    ours = {part for part in below(RecipeModel) if part.__module__.startswith("mergekit_ray.")}
    assert ours == {*PARTS, RecipeModel, ZeroEmbedding, Around}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yml")), ids=lambda file: file.stem)
def test_the_example_recipes_are_the_same_from_keywords(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    kind = MoeRecipe if "experts" in data else DenseRecipe
    built = kind(**data)
    assert built == load_recipe(data, on_warning=str)
    assert load_recipe(built.to_yaml(), on_warning=str) == built


def test_parts_are_the_same_as_mappings() -> None:
    dense = DenseRecipe(
        merge_method="dare_ties",
        models=[
            InputModel(model="org/a@v1+org/lora", parameters={"weight": [0, 0.5, 1], "density": 0.5}),
            InputModel(model=PurePath("b"), parameters={"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}),
        ],
        base_model=ModelReference("org/base"),
        dtype=DType.BF16,
        tokenizer=TokenizerOptions(
            source="union",
            tokens={
                "<a>": TokenEmbedding(source="org/a", force=True),
                "<b>": TokenEmbedding(source=ModelTokenEmbedding(model="org/a", token_id=3)),
                "<c>": TokenEmbedding(source=ZeroEmbedding()),
            },
        ),
        include="*.mlp.*",
        from_model="org/base",
        output=OutputOptions(path=Path("/out"), max_shard_size="5GB"),
    )
    text = """
        merge_method: dare_ties
        models:
          - {model: org/a@v1+org/lora, parameters: {weight: [0, 0.5, 1], density: 0.5}}
          - {model: ./b, parameters: {weight: [{filter: mlp, value: 1}, {value: 0.5}]}}
        base_model: org/base
        dtype: bfloat16
        tokenizer:
          source: union
          tokens:
            <a>: {source: org/a, force: true}
            <b>: {source: {kind: model_token, model: org/a, token_id: 3}}
            <c>: {source: {kind: zero}}
        include: ["*.mlp.*"]
        from: org/base
        output: {path: /out, max_shard_size: 5GB}
    """
    assert dense == load_recipe(text)
    assert load_recipe(dense.to_yaml()) == dense
    moe = MoeRecipe(
        base_model="org/base",
        experts=[ExpertRecipe(source_model="org/a", positive_prompts="code"), {"source_model": "org/b"}],
        gate_mode=GateMode.RANDOM,
    )
    experts = [{"source_model": "org/a", "positive_prompts": ["code"]}, {"source_model": "org/b"}]
    assert moe == load_recipe({"base_model": "org/base", "experts": experts, "gate_mode": "random"})


@pytest.mark.parametrize(
    ("build", "lines"),
    [
        (
            lambda: DenseRecipe(merge_method="linear", models=[{"model": "a"}], base_modle="b"),
            ["DenseRecipe: one problem", "  base_modle: unknown key 'base_modle'", "    did you mean 'base_model'?"],
        ),
        (
            lambda: DenseRecipe(merge_method="linear", models=[{"model": ""}, {"model": "a/b@"}], seed=-1),
            ["3 problems", "  models[0].model: a model's path is empty", "  models[1].model: ", "  seed: "],
        ),
        (lambda: InputModel(model="a", parameters={"weight": float("nan")}), ["InputModel: ", "  parameters.weight: "]),
        (
            lambda: SliceRecipe(sources=[SliceSource(model="a", layer_range=[4, 2])]),
            ["SliceSource: ", "  layer_range: the layer range [4, 2] runs backwards", "    write [first, last + 1]"],
        ),
        (
            lambda: DenseRecipe(merge_method="linear", models=[{"model": "a"}], slices=[{"sources": []}]),
            ["  slices[0].sources: an empty list"],
        ),
        (
            lambda: DenseRecipe(merge_method="linear", models=[{"model": "a"}], modules={"encoder": {}}),
            ["  modules.encoder: nothing to merge: none of `models` or `slices` is given"],
        ),
        (
            lambda: MoeRecipe(base_model="a", experts=[{"source_model": "b"}]),
            ["MoeRecipe: ", "  experts[0].positive_prompts: gate_mode 'hidden' makes the router from prompts"],
        ),
        (
            lambda: DenseRecipe(merge_method="linear", models=[{"model": "a"}], exclude="x", from_model="b"),
            ["  from: `from` names 'b'"],
        ),
    ],
)
def test_what_is_wrong_is_said_without_a_file(build: Any, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    text = str(caught.value)
    for line in lines:
        assert line in text
    assert "pydantic" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_recipes_show_themselves_in_a_line() -> None:
    models = [InputModel(model=f"org/m{i}", parameters={"weight": 1.0}) for i in range(300)]
    recipe = DenseRecipe(merge_method="linear", models=models, output="s3://bucket/<merged>")
    assert repr(recipe) == "<DenseRecipe linear of 300 models to s3://bucket/<merged>>"
    assert "- model: org/m299\n" in recipe._repr_html_()
    assert "&lt;merged&gt;" in recipe._repr_html_()
    assert repr(models[0]) == "InputModel(model='org/m0', parameters={'weight': 1.0})"
    moe = MoeRecipe(base_model="org/base", experts=[ExpertRecipe(source_model="org/a")], gate_mode="random")
    assert repr(moe) == "<MoeRecipe 1 expert on org/base>"
    assert "gate_mode: random\n" in moe._repr_html_()


def test_from_has_its_python_name_in_python_only() -> None:
    data: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}], "exclude": ["x"]}
    assert DenseRecipe(**data, from_model="a") == DenseRecipe(**data, **{"from": "a"})
    with pytest.raises(ConfigError, match="unknown key 'from_model'"):
        load_recipe({**data, "from_model": "a"})
