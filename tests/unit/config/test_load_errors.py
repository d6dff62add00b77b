from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.config.load import load_recipe
from mergekit_ray.core.errors import ConfigError, Problem
from support.declared_methods import Methods


def problems(source: Any, methods: Methods, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, methods=methods, on_warning=lambda _: None, **options)
    assert caught.value.exit_code == 2
    assert all(problem.what in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def brief(found: tuple[Problem, ...]) -> list[tuple[str, str]]:
    return [(problem.where, problem.path) for problem in found]


def test_all_problems_of_a_file_at_once_in_file_order(tmp_path: Path, methods: Methods) -> None:
    file = tmp_path / "untidy.yml"
    file.write_text(
        """\
merge_method: ties
base_model: org/base
titel: x
models:
  - model: org/a
    parameters:
      wieght: 0.5
      density: [0.1, two]
  - model: org/b
    weight: 3
    parameters: {weight: x, density: 1.5}
  - model: org/base
  - org/c
dtype: bfloat61
parameters:
  normalize: [0, 1]
seed: -1
"""
    )
    found = problems(file, methods)
    assert brief(found) == [
        (f"{file}:3", "titel"),
        (f"{file}:7", "models[0].parameters.wieght"),
        (f"{file}:8", "models[0].parameters.density[1]"),
        (f"{file}:10", "models[1].weight"),
        (f"{file}:11", "models[1].parameters.weight"),
        (f"{file}:11", "models[1].parameters.density"),
        (f"{file}:13", "models[3]"),
        (f"{file}:14", "dtype"),
        (f"{file}:16", "parameters.normalize"),
        (f"{file}:17", "seed"),
    ]
    by_path = {problem.path: problem for problem in found}
    assert by_path["models[0].parameters.wieght"].hint == "did you mean 'weight'?"
    assert "parameters:" in by_path["models[1].weight"].hint
    assert "found 1.5" in by_path["models[1].parameters.density"].what
    assert by_path["models[3]"].hint == "write `- model: org/c`"
    assert "did you mean 'bfloat16'" in by_path["dtype"].what
    assert "cannot vary gradually" in by_path["parameters.normalize"].what


HEAD = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
SLERP = "merge_method: slerp\nparameters: {t: 0.5}\nbase_model: a\n"


@pytest.mark.parametrize(
    ("text", "line", "path", "what", "hint"),
    [
        (HEAD + "form: a\n", 4, "form", "unknown key 'form'; accepted: base_model, ", "did you mean 'from'?"),
        (
            HEAD + "missing: frist\n",
            4,
            "missing",
            "accepted: error, base, first, drop, merge; found 'frist'",
            "did you mean 'first'?",
        ),
        (HEAD + "exclude: []\n", 4, "exclude", "an empty list", "list at least one, or remove it"),
        (
            HEAD + "exclude: x\nfrom: aa\n",
            5,
            "from",
            "`from` names 'aa', which the recipe does not merge; accepted: a",
            "did you mean 'a'?",
        ),
        (HEAD + "dtpye: float16\n", 4, "dtpye", "unknown key 'dtpye'; accepted: base_model, ", "did you mean 'dtype'?"),
        (HEAD + "merge_method: ties\n", 4, "merge_method", "appears twice; first at line 1", "keep one"),
        (HEAD + "out_dtype: int8\n", 4, "out_dtype", "unknown dtype 'int8'", ""),
        (HEAD + "compute_dtype: input\n", 4, "compute_dtype", "did you mean 'inputs'?", ""),
        (HEAD + "output: {max_shard_size: 2XB}\n", 4, "output.max_shard_size", "found '2XB'", ""),
        (HEAD + "output: 3.5.\nseed: x\n", 5, "seed", "expected a whole number, found 'x'", ""),
        (HEAD + "tokenizer_source: union\ntokenizer: {}\n", 4, "tokenizer_source", "beside `tokenizer`", "keep"),
        (
            HEAD + "tokenizer: {source: union, pad_to_multiple_of: 0}\n",
            4,
            "tokenizer.pad_to_multiple_of",
            "found 0",
            "",
        ),
        (HEAD + "tokenizer_source: unoin\n", 4, "tokenizer_source", "neither union nor base", "did you mean 'union'?"),
        (
            HEAD + "tokenizer: {tokens: {x: {source: zero}}}\n",
            4,
            "tokenizer.tokens.x.source",
            "'zero' is a kind of source",
            "{kind: zero}",
        ),
        (
            HEAD + "tokenizer: {tokens: {x: {source: {kind: model_token, token: a}}}}\n",
            4,
            "tokenizer.tokens.x.source.model",
            "'model' is missing",
            "write `model: org/name`",
        ),
        (
            HEAD + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a/b, token_id: -3}}}}\n",
            4,
            "tokenizer.tokens.x.source.token_id",
            "expected at least 0, found -3",
            "",
        ),
        (
            HEAD + "tokenizer: {tokens: {x: {source: {kind: model_token, modle: a/b, token: a}}}}\n",
            4,
            "tokenizer.tokens.x.source.modle",
            "unknown key 'modle'",
            "did you mean 'model'?",
        ),
        (HEAD + "base_model: a+b+c\n", 4, "base_model", "more than one LoRA", ""),
        (HEAD + "parameters: {normalize: 3}\n", 4, "parameters.normalize", "expected true or false, found 3", ""),
        (HEAD + "parameters: {weight: x}\n", 4, "parameters.weight", "expected a number, found 'x'", ""),
        (HEAD + "parameters: {weight: [1, y]}\n", 4, "parameters.weight[1]", "expected a number, found 'y'", ""),
        (HEAD + "seed: -1\n", 4, "seed", "expected at least 0, found -1", ""),
        (
            HEAD.replace("linear", "ties") + "base_model: b\nparameters: {density: 2.5}\n",
            5,
            "parameters.density",
            "expected at most 1, found 2.5",
            "",
        ),
        (HEAD + "name: ''\n", 4, "name", "empty text", "write some, or remove it"),
        (HEAD + "name: [x]\n", 4, "name", "expected text, found a list", ""),
        (HEAD + "parameters: 3\n", 4, "parameters", "expected a mapping", ""),
        (
            HEAD.replace("linear", "lienar"),
            1,
            "merge_method",
            "unknown merge method 'lienar'",
            "did you mean 'linear'?",
        ),
        (
            HEAD.replace("weight: 1", "weight: 1, zeta: 1"),
            3,
            "models[0].parameters.zeta",
            "linear has no parameter",
            "remove it",
        ),
        (
            HEAD.replace("weight: 1", ""),
            3,
            "models[0].parameters.weight",
            "needs 'weight' for each model; a has none",
            "",
        ),
        (HEAD.replace("model: a", "modle: a"), 3, "models[0].modle", "unknown key 'modle'", "did you mean 'model'?"),
        (HEAD.replace("model: a,", ""), 3, "models[0].model", "'model' is missing", "org/name"),
        ("merge_method: linear\nmodels: []\n", 2, "models", "an empty list", ""),
        ("merge_method: linear\nmodels: {model: a}\n", 2, "models", "expected a list, found a mapping", ""),
        ("merge_method: linear\nmodules: {}\n", 2, "modules", "an empty mapping", ""),
        ("models:\n  - model: a\n", 1, "merge_method", "'merge_method' is missing", "merge_method: linear"),
        ("merge_method: linear\nbase_model: a\n", 1, "", "nothing to merge", "models:"),
        (HEAD + "slices: []\n", 4, "slices", "an empty list", ""),
        (
            HEAD + "slices:\n  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]\n",
            4,
            "slices",
            "`models` and `slices` are both given; accepted: exactly one of `models`, `slices` or `modules`",
            "remove",
        ),
        (
            "merge_method: linear\nmodules:\n  text:\n    parameters: {weight: 1}\n",
            3,
            "modules.text",
            "nothing to merge: none of `models` or `slices`",
            "",
        ),
        (
            SLERP
            + "slices:\n  - sources:\n    - {model: a, layer_range: [0, 8]}\n    - {model: b, layer_range: [0, 9]}\n",
            7,
            "slices[0].sources[1].layer_range",
            "different numbers of layers: [0, 8] (8), [0, 9] (9)",
            "same length",
        ),
        (
            SLERP + "models: [{model: b}, {model: c}]\n",
            4,
            "models",
            "base_model a is neither of b and c",
            "mergekit refuses",
        ),
        (SLERP + "models: [{model: a}]\n", 4, "models", "takes exactly 1 model beside", ""),
        (
            "merge_method: nuslerp\nbase_model: a\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n",
            4,
            "models",
            "takes exactly 2 models beside the base model, found 1",
            "or remove `base_model` if a is to be merged itself",
        ),
        (
            "merge_method: slerp\nmodels: [{model: b}]\nbase_model: a\n",
            1,
            "parameters.t",
            "needs the parameter 't'",
            "t: 0.5",
        ),
        (
            SLERP.replace("base_model: a\n", "") + "models: [{model: b}]\n",
            1,
            "base_model",
            "slerp needs a base model",
            "one of",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n",
            2,
            "models",
            "exactly 1 model, found 2",
            "remove",
        ),
        (
            "merge_method: model_stock\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
            3,
            "models",
            "at least 2 models beside the base model, found 1",
            "list more",
        ),
        (
            "merge_method: passthrough\nmodules:\n  projector:\n    slices: [{sources: [{model: a}]}]\n",
            4,
            "modules.projector.slices[0].sources[0].layer_range",
            "'layer_range' is missing",
            "; a module without layers (a projector) takes `models` in place of `slices`",
        ),
        (
            "merge_method: passthrough\nmodules: {x: {slices: [{sources: [{model: a, layer_range: [0, 0]}]}]}}\n",
            2,
            "modules.x.slices[0].sources[0].layer_range",
            "[0, 0] is empty",
            "a module without layers",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources:\n      - model: a\n        layer_range: [4, 4]\n",
            5,
            "slices[0].sources[0].layer_range",
            "[4, 4] is empty",
            "last + 1",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [-4, 4]}]\n",
            3,
            "slices[0].sources[0].layer_range",
            "counted from 0",
            "",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0.5, 4]}]\n",
            3,
            "slices[0].sources[0].layer_range",
            "found 0.5",
            "",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: a}]\n",
            3,
            "slices[0].sources[0].layer_range",
            "is missing",
            "[0, 16]",
        ),
        (
            "merge_method: ties\nbase_model: a\nparameters: {weight: 1}\nslices:\n"
            "  - sources: [{model: b, layer_range: [0, 2]}, {model: c, layer_range: [2, 4]}]\n",
            5,
            "slices[0].sources",
            "which layers of the base model a belong here is unclear",
            "list the base model",
        ),
        ("- a\n- b\n", 1, "", "a recipe is a mapping, found a list", "merge_method"),
        ("title: x\nexpert: []\n", 1, "", "neither kind of recipe", "`experts`"),
        ("merge_method: moe\nmodels: [{model: a}]\n", 2, "models", "two kinds of recipe", "backbone"),
        ("base_model: b\nexperts: [{source_model: a}]\nslices: [{sources: []}]\n", 3, "slices", "two kinds", ""),
    ],
)
def test_one_problem_one_message(text: str, line: int, path: str, what: str, hint: str, methods: Methods) -> None:
    (problem,) = problems(text, methods)
    assert (problem.where, problem.path) == (f"<text>:{line}", path)
    assert what in problem.what
    assert hint in problem.hint


def test_a_required_weight_may_stand_at_any_level(methods: Methods) -> None:
    text = "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [0, 1]%s}]%s\n%s"
    for filled in (("", "", "parameters: {weight: 1}"), (", parameters: {weight: 1}", "", "")):
        load_recipe(text % filled, methods=methods)
    load_recipe(text % ("", "\n    parameters: {weight: 1}", ""), methods=methods)
    assert len(problems(text % ("", "", ""), methods)) == 1


def test_mappings_have_paths_but_no_lines(methods: Methods) -> None:
    (problem,) = problems({"merge_method": "linear", "models": [{"model": "a", "parameters": {"wieght": 1}}]}, methods)
    assert (problem.where, problem.path) == ("", "models[0].parameters.wieght")


def test_a_problem_behind_an_alias_stands_where_it_is_written(methods: Methods) -> None:
    text = (
        "merge_method: linear\nmodels:\n  - model: a\n    parameters: &p\n      wieght: 1\n"
        "  - {model: b, parameters: *p}\n"
    )
    assert brief(problems(text, methods)) == [
        ("<text>:5", "models[0].parameters.wieght"),
        ("<text>:5", "models[1].parameters.wieght"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.yml", None, "there is no such recipe"),
        ("latin.yml", b"a: 1\nb: \xe9\n", "byte 0xe9 at line 2"),
        ("big.yml", b"#" * (5 << 20), "4 MiB"),
        ("broken.yml", b"a: [", "not valid YAML"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, words: str, methods: Methods
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    for source in (file, str(file)):
        with pytest.raises(ConfigError) as caught:
            load_recipe(source, methods=methods)
        assert words in str(caught.value)
        assert str(file) in str(caught.value)


def test_a_misspelt_file_has_its_neighbour_suggested(tmp_path: Path, methods: Methods) -> None:
    (tmp_path / "merge.yml").write_text(HEAD)
    with pytest.raises(ConfigError, match=r"did you mean 'merge\.yml'"):
        load_recipe(tmp_path / "merg.yml", methods=methods)


def test_a_folder_is_not_a_recipe(tmp_path: Path, methods: Methods) -> None:
    with pytest.raises(ConfigError, match="this is a folder"):
        load_recipe(tmp_path, methods=methods)


@pytest.mark.parametrize("source", ["nothing", "", "a" * 5000, "x\0y"])
def test_a_string_that_is_neither_file_nor_yaml_says_so(source: str, methods: Methods) -> None:
    with pytest.raises(ConfigError, match="is neither a file nor YAML text"):
        load_recipe(source, methods=methods)


def test_a_mapping_that_holds_itself_is_refused(methods: Methods) -> None:
    data: dict[str, Any] = {"merge_method": "linear"}
    data["models"] = [data]
    with pytest.raises(ConfigError, match="contains itself"):
        load_recipe(data, methods=methods)
    with pytest.raises(ConfigError, match="key 3 is not text"):
        load_recipe({3: 4}, methods=methods)


def test_lenient_makes_warnings_of_unknown_keys_and_parameters_only(methods: Methods) -> None:
    text = HEAD.replace("weight: 1", "weight: 1, foo: 2") + "bar: {baz: 1}\nparameters: {qux: [1, 2]}\n"
    told: list[Problem] = []
    recipe = load_recipe(text, lenient=True, on_warning=told.append, methods=methods)
    assert brief(tuple(told)) == [
        ("<text>:3", "models[0].parameters.foo"),
        ("<text>:4", "bar"),
        ("<text>:5", "parameters.qux"),
    ]
    assert recipe == load_recipe(HEAD, methods=methods)
    assert len(problems(text, methods)) == 3
    assert brief(problems(text + "dtype: x\n", methods, lenient=True)) == [("<text>:6", "dtype")]


def test_what_a_misspelling_meant_is_missing_if_it_is_ignored(methods: Methods) -> None:
    text = HEAD.replace("weight", "wieght")
    assert [p.path for p in problems(text, methods)] == ["models[0].parameters.wieght"]
    assert [p.path for p in problems(text, methods, lenient=True)] == ["models[0].parameters.weight"]
    text = HEAD.replace("merge_method", "merge_metod")
    assert [p.path for p in problems(text, methods)] == ["merge_metod"]
    assert [p.path for p in problems(text, methods, lenient=True)] == ["merge_method"]
