"""Whether the sizes that a config states are those of the embedding and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mergekit_ray.architectures.anatomy import Anatomy, language_config
from mergekit_ray.core.tensors import TensorSpec

_ROW_KEYS: Final = ("vocab_size",)
_PADDED_KEYS: Final = ("pad_vocab_size_multiple",)
"""Of families that make more rows than they state."""

_WIDTH_KEYS: Final = ("hidden_size", "n_embd", "d_model")
_OTHER_WIDTH_KEYS: Final = ("word_embed_proj_dim", "embedding_size")
"""Of families whose embeddings are narrower than their layers."""


def hidden_size(embedding: TensorSpec | None, config: Mapping[str, Any]) -> int | None:
    """The width of the layers: as the config states it, else the embedding's; None if neither tells.

    Args:
        embedding: the input embedding, if there is one.
        config: ``config.json``.
    """
    inner = language_config(config)
    stated = next((inner[key] for key in _WIDTH_KEYS if type(inner.get(key)) is int), None)
    return embedding.shape[1] if stated is None and embedding is not None else stated


def misfits(parts: Anatomy, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> list[str]:
    """What a config says of sizes that its tensors belie, in words that begin with "says" or "head".

    Args:
        parts: the anatomy of the checkpoint.
        specs: its tensors.
        config: its ``config.json``.
    """
    embedding = None if parts.embedding is None else specs[parts.embedding]
    if embedding is None or len(embedding.shape) != 2:
        return []
    inner = language_config(config)
    head = None if parts.head is None else specs.get(parts.head)
    found = []
    if head is not None and len(head.shape) == 2:
        # Mllama and Moshi embed a few things more than they can say: the head has the rows that the config states.
        says_less = inner.get("vocab_size") == head.shape[0] < embedding.shape[0]
        # Reformer's head reads two streams at once.
        is_as_wide = head.shape[1] in (embedding.shape[1], 2 * embedding.shape[1])
        if not is_as_wide or (head.shape[0] != embedding.shape[0] and not says_less):
            found.append(f"head {list(head.shape)} and embedding {list(embedding.shape)} do not fit")
        rows = head if says_less else embedding
    else:
        rows = embedding
    return [
        *_of_dimension(inner, _ROW_KEYS, rows, 0, "rows", unless=_PADDED_KEYS),
        *_of_dimension(inner, _WIDTH_KEYS, embedding, 1, "columns", unless=_OTHER_WIDTH_KEYS),
        *found,
    ]


def _of_dimension(
    config: Mapping[str, Any],
    keys: Sequence[str],
    spec: TensorSpec,
    dimension: int,
    word: str,
    *,
    unless: Sequence[str],
) -> list[str]:
    key = next((key for key in keys if isinstance(config.get(key), int | float)), None)
    if key is None or any(config.get(other) is not None for other in unless):
        return []
    if config[key] == spec.shape[dimension]:
        return []
    return [f"says {key} {config[key]}, and {spec.name!r} has {spec.shape[dimension]} {word}"]
