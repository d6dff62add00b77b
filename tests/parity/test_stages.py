"""Recipes of several stages, by both programs: theirs writes each stage, ours none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parity.comparison import difference_units
from parity.conftest import Program
from support.models import tensors_of
from support.tokenizers.models import byte_level, ids_of, rows_of, save_model

pytestmark = pytest.mark.parity

UNITS = 2.0
"""Of the last place of float32, or of a product of two numbers of the inputs' size."""


@pytest.fixture(scope="session")
def staged_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("staged")
    tokenizers = {"a": byte_level(), "b": byte_level(), "c": byte_level(), "chat": byte_level(["<|im_start|>"])}
    return {
        name: save_model(root / name, tokenizer, seed, num_hidden_layers=4)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }


def linear(*models: str, **rest: Any) -> dict[str, Any]:
    weights = (0.7, 0.3, 0.5)
    listed = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=False)]
    return {"merge_method": "linear", "models": listed, "dtype": "float32", **rest}


def cut(model: str, first: int, last: int) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [first, last]}]}


SLERP = {"merge_method": "slerp", "parameters": {"t": 0.3}, "dtype": "float32"}
TASKS = {"merge_method": "task_arithmetic", "dtype": "float32", "parameters": {"weight": 0.5}}
STACKED = {"merge_method": "passthrough", "dtype": "float32"}
CASES: dict[str, list[dict[str, Any]]] = {
    "a merge of merges": [
        linear("{a}", "{b}", name="x"),
        linear("{b}", "{c}", name="y"),
        {**SLERP, "base_model": "x", "models": [{"model": "x"}, {"model": "y"}]},
    ],
    "a merge as the base": [
        linear("{a}", "{b}", name="x"),
        {**TASKS, "base_model": "x", "models": [{"model": "{c}"}, {"model": "{a}"}]},
    ],
    "a frankenmerge of merges": [
        linear("{a}", "{b}", name="x"),
        {**SLERP, "base_model": "{c}", "models": [{"model": "{b}"}, {"model": "{c}"}], "name": "y"},
        {**STACKED, "slices": [cut("x", 0, 3), cut("y", 1, 4)]},
    ],
    "a frankenmerge that is merged": [
        {
            "merge_method": "passthrough",
            "slices": [cut("{a}", 0, 2), cut("{b}", 2, 4)],
            "name": "x",
            "dtype": "float32",
        },
        linear("x", "{c}"),
    ],
    "a stage with a tokenizer": [
        linear("{a}", "{chat}", name="x", tokenizer_source="union"),
        linear("x", "{chat}"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_model(
    case: str, staged_models: dict[str, Path], mergekit_ray: Program, multi: Program, tmp_path: Path
) -> None:
    text = yaml.safe_dump_all(CASES[case], sort_keys=False)
    for name, folder in staged_models.items():
        text = text.replace(f"'{{{name}}}'", str(folder))
    recipe = tmp_path / "stages.yml"
    recipe.write_text(text)
    mergekit_ray.run(recipe, tmp_path / "ours", log=tmp_path / "ours.log")
    multi.run(recipe, "-I", tmp_path / "between", "--out-path", tmp_path / "theirs", log=tmp_path / "theirs.log")
    found, expected = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    vocabulary = {"model.embed_tokens.weight", "lm_head.weight"} if "tokenizer" in case else set()
    assert found.keys() == expected.keys()
    for name in found.keys() - vocabulary:
        assert difference_units(found[name], expected[name], torch.float32).max() <= UNITS, name
    for name in vocabulary:
        own, theirs = rows_of(tmp_path / "ours", name), rows_of(tmp_path / "theirs", name)
        assert own.keys() == theirs.keys() == ids_of(tmp_path / "theirs").keys()
        for token in own:
            torch.testing.assert_close(own[token], theirs[token], rtol=0, atol=1e-6)
