"""Sizes that a config states, beside those of its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.architectures.sizes import misfits
from support.fake_checkpoints import checkpoint, llama_shapes, plan_of, specs_of

EMBEDDING = "model.embed_tokens.weight"


def found(embedding: tuple[int, int], head: tuple[int, int] | None, **config: Any) -> list[str]:
    shapes = {**llama_shapes(1), EMBEDDING: embedding, "lm_head.weight": head or (1, 1)}
    if head is None:
        del shapes["lm_head.weight"]
    specs = specs_of(shapes)
    stated = {"num_hidden_layers": 1, "tie_word_embeddings": head is None, **config}
    return misfits(anatomy(specs, stated, "here"), specs, stated)


@pytest.mark.parametrize(
    ("embedding", "head", "config"),
    [
        ((20, 8), (20, 8), {"vocab_size": 20, "hidden_size": 8}),
        ((20, 8), None, {"vocab_size": 20}),
        ((20, 8), (20, 8), {}),
        ((20, 8), (20, 16), {"vocab_size": 20, "hidden_size": 8}),  # Reformer
        ((28, 8), (20, 8), {"vocab_size": 20}),  # Mllama
        ((21, 8), (20, 8), {"vocab_size": 20}),  # Moshi
        ((20, 4), (20, 4), {"vocab_size": 20, "hidden_size": 8, "word_embed_proj_dim": 4}),  # OPT
        ((24, 8), (24, 8), {"vocab_size": 20, "pad_vocab_size_multiple": 8}),  # Mamba
    ],
)
def test_sizes_that_fit(embedding: tuple[int, int], head: tuple[int, int] | None, config: dict[str, Any]) -> None:
    assert found(embedding, head, **config) == []


@pytest.mark.parametrize(
    ("embedding", "head", "config", "misfit"),
    [
        ((20, 8), (20, 8), {"vocab_size": -3}, f"says vocab_size -3, and {EMBEDDING!r} has 20 rows"),
        ((20, 8), None, {"hidden_size": 1e308}, f"says hidden_size 1e+308, and {EMBEDDING!r} has 8 columns"),
        ((28, 8), None, {"vocab_size": 20}, f"says vocab_size 20, and {EMBEDDING!r} has 28 rows"),
        ((20, 8), (28, 8), {"vocab_size": 20}, "head [28, 8] and embedding [20, 8] do not fit"),
        ((20, 8), (20, 4), {"vocab_size": 20}, "head [20, 4] and embedding [20, 8] do not fit"),
    ],
)
def test_sizes_that_do_not(
    embedding: tuple[int, int], head: tuple[int, int] | None, config: dict[str, Any], misfit: str
) -> None:
    assert found(embedding, head, **config) == [misfit]


def test_a_plan_warns_of_them() -> None:
    wrong = checkpoint("/a", llama_shapes(1), {"num_hidden_layers": 1, "vocab_size": 7})
    plan = plan_of("merge_method: passthrough\nmodels: [{model: /a}]\n", wrong)
    assert [w for w in plan.warnings if w.startswith("config.json of /a says vocab_size 7, and")] != []
