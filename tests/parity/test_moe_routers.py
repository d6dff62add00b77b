"""Router vectors of mergekit-moe and ours, for the same recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from mergekit_ray.checkpoint.opening import open_checkpoint
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.routing.routers import Routers, routers
from mergekit_ray.storage.opening import open_source
from parity.checkpoints import SHAPE
from parity.comparison import load_checkpoint
from parity.conftest import REPOSITORY, Program
from support.models import save_tokenizer

pytestmark = pytest.mark.parity

BFLOAT16 = 2.0**-8
"""Relative spacing: mergekit-moe computes hidden states in bfloat16 whatever the recipe's dtype, we in float32."""

PROMPTS = [
    (["the capital of France", "Paris is", "the Paris of the capital"], ["of France is", "the"]),
    (["is the", "of the capital France Paris is"], []),
    (["France of Paris capital is the capital"], ["Paris"]),
]
SAME_LENGTH = [
    (["the capital of", "France is Paris"], ["Paris Paris France"]),
    (["is the capital"], []),
    (["of of France"], ["France capital the"]),
]

Route = Callable[..., tuple[Routers, dict[int, np.ndarray]]]


@pytest.fixture(scope="module")
def mergekit_moe() -> Iterator[Program]:
    """Its other program, in the environment that the other parity tests use."""
    named = os.environ.get("MERGEKIT_PYTHON")
    python = Path(named or REPOSITORY / ".venv-mergekit/bin/python")
    if not python.exists() and not named:
        pytest.skip("mergekit is not there to compare with: `make parity` installs it apart and runs these tests")
    program = Program(python, "mergekit-moe")
    yield program
    program.close()


@pytest.fixture
def route(mergekit_moe: Program, family: Callable[[str], dict[str, Path]], tmp_path: Path) -> Route:
    """Our routers, and mergekit-moe's by layer."""

    def run(gate_mode: str, prompts: list[tuple[list[str], list[str]]]) -> tuple[Routers, dict[int, np.ndarray]]:
        places = family("llama")
        base = shutil.copytree(places["base"], tmp_path / "base")
        save_tokenizer(base)
        experts = [
            {"source_model": str(places[variant]), "positive_prompts": positive, "negative_prompts": negative}
            for variant, (positive, negative) in zip("abc", prompts, strict=True)
        ]
        recipe = {"base_model": str(base), "gate_mode": gate_mode, "dtype": "float32", "experts": experts}
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump({**recipe, "architecture": "mixtral"}))
        mergekit_moe.run(file, tmp_path / "theirs", "--quiet", log=tmp_path / "log")
        tensors = load_checkpoint(tmp_path / "theirs")
        gates = {
            int(key.split(".layers.")[1].split(".")[0]): tensor.numpy()
            for key, tensor in tensors.items()
            if key.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
        }
        loaded = MoeRecipe.model_validate(recipe)
        return routers(loaded, {loaded.base_model: open_checkpoint(open_source(str(base)), str(base))}), gates

    return run


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1, in float64."""
    found = rows.astype(np.float64)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("gate_mode", "prompts"),
    [
        ("hidden", PROMPTS),
        ("hidden_last", PROMPTS),
        # mergekit-moe's mean takes padding in, so only prompts of one length can be compared.
        ("hidden_avg", SAME_LENGTH),
    ],
)
def test_hidden_states(gate_mode: str, prompts: list[tuple[list[str], list[str]]], route: Route) -> None:
    ours, theirs = route(gate_mode, prompts)
    assert list(ours.vectors) == sorted(theirs) == list(range(SHAPE["num_hidden_layers"]))
    for layer, rows in ours.vectors.items():
        assert rows.shape == theirs[layer].shape
        distance = np.linalg.norm(unit(rows) - unit(theirs[layer]), axis=1)
        # Each layer adds to the state with a rounding; then those of mean, difference (of longer terms) and length.
        assert distance.max() <= (3 + layer) * BFLOAT16, layer


def test_embeddings(route: Route) -> None:
    ours, theirs = route("cheap_embed", PROMPTS)
    assert list(ours.vectors) == sorted(theirs)
    for layer, rows in ours.vectors.items():
        np.testing.assert_allclose(rows, theirs[layer], rtol=0, atol=4e-7)
