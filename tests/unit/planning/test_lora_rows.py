"""Adapters that hold single rows of embeddings, by headers alone."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import Adapter
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Concat, Expression, Load, from_json, loads, to_json
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.weights import StoredWeights
from support.adapter_headers import adapter_of
from support.fake_checkpoints import llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_DELTA = "lm_head.token_adapter.trainable_tokens_delta"


def view(base: Checkpoint, adapter: Adapter) -> LoraWeights:
    return LoraWeights(StoredWeights("m0", base), base.config, "a0", adapter)


def parts_of(expression: Expression, base: Checkpoint, adapter: Adapter) -> list[tuple[str, int, int]]:
    """Of each part, where it comes from, its first row there, and how many it has."""
    assert isinstance(expression, Concat)
    found = []
    for part in expression.parts:
        (load,) = loads(part)
        whole = {"m0": base, "a0": adapter.checkpoint}[load.model].tensors[load.spec.name][1]
        per_row = load.location.num_bytes // load.spec.shape[0]
        found.append((load.model, (load.location.start - whole.start) // per_row, part.spec.shape[0]))
    return found


def test_single_rows_replace_those_of_the_embedding() -> None:
    base, adapter = llama("/base"), adapter_of({DELTA: (3, 4)}, trainable_token_indices=[3, 8, 4])
    found = view(base, adapter)
    expression = found.expression(EMBEDDING)
    assert expression.spec == found.specs[EMBEDDING]
    assert parts_of(expression, base, adapter) == [
        ("m0", 0, 3),
        ("a0", 0, 1),
        ("a0", 2, 1),
        ("m0", 5, 3),
        ("a0", 1, 1),
        ("m0", 9, 1),
    ]
    assert parts_of(found.expression(EMBEDDING, (4, 4)), base, adapter) == [("m0", 0, 3), ("a0", 0, 1)]
    assert isinstance(found.expression(HEAD), Load)
    assert from_json(to_json(expression)) == expression


def test_rows_at_both_ends() -> None:
    base = llama("/base")
    adapter = adapter_of({DELTA: (2, 4)}, trainable_token_indices={"embed_tokens": [9, 0]})
    parts = parts_of(view(base, adapter).expression(EMBEDDING), base, adapter)
    assert parts == [("a0", 1, 1), ("m0", 1, 8), ("a0", 0, 1)]


def test_rows_of_head_and_embedding() -> None:
    rows = {"embed_tokens": [3], "lm_head": [1]}
    adapter = adapter_of({DELTA: (1, 4), HEAD_DELTA: (1, 4)}, trainable_token_indices=rows)
    base, tied = llama("/base"), llama("/base", tied=True)
    found = view(base, adapter)
    assert parts_of(found.expression(EMBEDDING), base, adapter) == [("m0", 0, 3), ("a0", 0, 1), ("m0", 4, 6)]
    assert parts_of(found.expression(HEAD), base, adapter) == [("m0", 0, 1), ("a0", 0, 1), ("m0", 2, 8)]
    both = view(tied, adapter)
    parts = parts_of(both.expression(EMBEDDING), tied, adapter)
    assert parts == [("m0", 0, 1), ("a0", 0, 1), ("m0", 2, 1), ("a0", 0, 1), ("m0", 4, 6)]
    assert both.config["tie_word_embeddings"] is True


def test_rows_of_a_resized_embedding() -> None:
    whole = DELTA.replace("trainable_tokens_delta", "base_layer.weight")
    base = llama("/base")
    adapter = adapter_of({DELTA: (2, 4), whole: (12, 4), HEAD: (12, 4)}, trainable_token_indices=[3, 11])
    found = view(base, adapter)
    assert found.config["vocab_size"] == 12
    parts = parts_of(found.expression(EMBEDDING), base, adapter)
    assert parts == [("a0", 0, 3), ("a0", 0, 1), ("a0", 4, 7), ("a0", 1, 1)]


@pytest.mark.parametrize(
    ("shapes", "rows", "message"),
    [
        ({DELTA: (2, 4)}, [1], r"is F32 \[2, 4\]; trainable_token_indices lists 1 row of 'model.embed_tokens.weight'"),
        ({DELTA: (1, 5)}, [1], r"is F32 \[1, 5\]; trainable_token_indices lists 1 row"),
        ({DELTA: (1, 4)}, {"lm_head": [1]}, "trainable_token_indices lists 0 rows"),
        (
            {DELTA: (1, 4)},
            [10],
            r"trains row 10 of 'model.embed_tokens.weight' .*, which has 10",
        ),
        (
            {
                DELTA: (1, 4),
                "model.embed_tokens.lora_embedding_A": (2, 10),
                "model.embed_tokens.lora_embedding_B": (4, 2),
            },
            [1],
            "it adapts 'model.embed_tokens.weight' and trains single rows of it as well",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(shapes: dict[str, Any], rows: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        view(llama("/base"), adapter_of(shapes, trainable_token_indices=rows))
