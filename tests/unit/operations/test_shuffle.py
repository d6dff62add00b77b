"""Recipes of layers that are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.operations.shuffle import shuffle
from support.memory_inputs import random_llama, write_model

DEPTH = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    config = {"model_type": "llama", "num_hidden_layers": DEPTH, "tie_word_embeddings": False, "vocab_size": 20}
    return [str(write_model(root / f"m{i}", random_llama(i, DEPTH), config)) for i in range(3)]


def layers(recipe: mergekit_ray.DenseRecipe) -> list[tuple[str, int]]:
    """Model and index of every layer of the result."""
    assert recipe.slices is not None
    sources = [source for each in recipe.slices for source in each.sources]
    return [(str(source.model), layer) for source in sources for layer in range(*source.layer_range)]


def test_every_layer_keeps_its_place(folders: list[str]) -> None:
    recipe = shuffle(folders, seed=1, dtype="bfloat16")
    assert [layer for _, layer in layers(recipe)] == list(range(DEPTH))
    assert {model for model, _ in layers(recipe)} == set(folders)
    assert mergekit_ray.load_recipe(recipe.to_yaml()) == recipe
    assert mergekit_ray.plan(recipe).shards


def test_runs_of_one_model_are_one_slice(folders: list[str]) -> None:
    recipe = shuffle(folders[:2], [1, 0])
    assert recipe.slices is not None
    assert [tuple(each.sources[0].layer_range) for each in recipe.slices] == [(0, DEPTH)]


def test_the_seed_decides(folders: list[str]) -> None:
    assert shuffle(folders, seed=3) == shuffle(folders, seed=3)
    assert shuffle(folders, seed=3) != shuffle(folders, seed=4)


def test_weights_are_shares(folders: list[str]) -> None:
    counts = Counter(model for seed in range(50) for model, _ in layers(shuffle(folders[:2], [1, 3], seed=seed)))
    assert sum(counts.values()) == 50 * DEPTH
    # 2000 draws: the standard deviation of the share is below 0.01.
    assert counts[folders[1]] / (50 * DEPTH) == pytest.approx(0.75, abs=0.05)


def test_layers_too_are_drawn(folders: list[str]) -> None:
    drawn = [layer for _, layer in layers(shuffle(folders, full_random=True))]
    assert len(drawn) == DEPTH
    assert drawn != list(range(DEPTH))
    assert 0 <= min(drawn) <= max(drawn) < DEPTH


@pytest.mark.parametrize(
    ("models", "weights", "said"),
    [
        (0, [], "no model"),
        (2, [1.0], "1 weights for 2 models"),
        (2, [1.0, -1.0], "these cannot be weights: 1.0, -1.0"),
        (2, [0.0, 0.0], "these cannot be weights"),
        (2, [1.0, float("nan")], "these cannot be weights"),
    ],
)
def test_what_cannot_be_drawn_from(models: int, weights: list[float], said: str, folders: list[str]) -> None:
    with pytest.raises(ConfigError, match=said):
        shuffle(folders[:models], weights)


def test_models_of_unlike_depth(folders: list[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 20}
    other = write_model(tmp_path / "other", random_llama(9), config)
    with pytest.raises(ModelError, match=f"{DEPTH} in .*, 2 in "):
        shuffle([folders[0], str(other)])
