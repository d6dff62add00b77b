"""Prompts that go through the layers together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from mergekit_ray.architectures.anatomy import language_config

MAX_BATCH_TOKENS: Final = 2048
"""Tokens of a batch, padding included; a longer prompt is a batch of its own."""

_LENGTH_DEPENDENT: Final = ("dynamic", "longrope", "su")

Tokens: TypeAlias = tuple[int, ...]
"""Ids of a prompt's tokens; none of an empty one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that go through a layer together.

    Attributes:
        indices: which of all prompts these are.
        tokens: of each, at least one.
    """

    indices: tuple[int, ...]
    tokens: tuple[Tokens, ...]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt."""
        return [len(tokens) for tokens in self.tokens]


def make_batches(
    tokens: Sequence[Tokens], *, max_tokens: int = MAX_BATCH_TOKENS, equal_lengths: bool = False
) -> list[Batch]:
    """Put prompts of similar lengths together, the shortest first.

    Args:
        tokens: of each prompt. Those without any are in no batch.
        max_tokens: of a batch, padding included.
        equal_lengths: let no batch need padding.

    Returns:
        Every other prompt once, in batches that depend on nothing but the arguments.
    """
    batches: list[Batch] = []
    chosen: list[int] = []

    def close() -> None:
        if chosen:
            batches.append(Batch(tuple(chosen), tuple(tokens[index] for index in chosen)))
            chosen.clear()

    for index in sorted(filter(tokens.__getitem__, range(len(tokens))), key=lambda index: len(tokens[index])):
        length = len(tokens[index])
        if (len(chosen) + 1) * length > max_tokens or (equal_lengths and chosen and len(tokens[chosen[0]]) < length):
            close()
        chosen.append(index)
    close()
    return batches


def depends_on_batch_length(config: Mapping[str, Any]) -> bool:
    """Whether rotary embeddings depend on the longest prompt of a batch, so that shorter ones must not be padded."""
    inner = language_config(config)
    scaling = json.dumps([inner.get("rope_scaling"), inner.get("rope_parameters")])
    return any(f'"{kind}"' in scaling for kind in _LENGTH_DEPENDENT)
