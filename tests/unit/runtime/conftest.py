"""Two small models in folders, and the plan of their merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_ray.core.plan import Plan
from mergekit_ray.runtime import api
from support.memory_inputs import random_llama, write_model

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    side = {"tokenizer__json": '{"version": "1.0"}', "README__md": "an old card", "training_args__bin": "x"}
    return [write_model(tmp_path / f"model-{name}", random_llama(i), CONFIG, **side) for i, name in enumerate("ab")]


def recipe_text(models: list[Path], extra: str = "") -> str:
    listed = "".join(f"- {{model: {path}, parameters: {{weight: {i + 1}}}}}\n" for i, path in enumerate(models))
    return f"merge_method: linear\nmodels:\n{listed}{extra}"


@pytest.fixture
def plan(models: list[Path]) -> Plan:
    """Three shards: a linear merge with weights 1 and 2."""
    made = api.plan(recipe_text(models, "output: {max_shard_size: 400}\n"))
    assert len(made.shards) == 3
    return made
