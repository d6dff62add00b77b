"""Two small models in folders, the plan of their merge, and a shard of all kinds of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Scale
from mergekit_ray.core.plan import InputModel, Plan, Shard
from mergekit_ray.operations.plan import plan as plan_of
from support.memory_inputs import random_llama, write_model
from support.shards import big_model, load_of, long_tensors, merged, shard_of

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
    made = plan_of(recipe_text(models, "output: {max_shard_size: 400}\n"))
    assert len(made.shards) == 3
    return made


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, InputModel], Shard]:
    """A shard of windows smaller than tensors, empty tensors, copies, scalars and integers."""
    a, b = (big_model(tmp_path / name, *long_tensors(i)) for i, name in enumerate("ab"))
    shard = shard_of(
        ("big", merged("big", load_of(a, "t0"), load_of(b, "t0"))),
        ("empty", merged("empty", load_of(a, "t1"), load_of(b, "t1"))),
        ("copied empty", load_of(a, "t1")),
        ("integers", load_of(b, "t2")),
        ("scalar", Scale(load_of(a, "t3"), 2.0, DType.F32)),
        ("copy", load_of(b, "t0")),
        ("last", load_of(b, "t1")),
    )
    return {"a": a, "b": b}, shard
