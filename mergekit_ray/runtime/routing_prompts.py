"""Prompts as tokens, and batches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mergekit_ray.architectures.anatomy import language_config
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.runtime.routing_tokenizer import Tokenizer, load_tokenizer

MAX_BATCH_TOKENS: Final = 2048
"""Tokens of a batch, padding included; a longer prompt is a batch of its own."""

_LENGTH_DEPENDENT: Final = ("dynamic", "longrope", "su")

Tokens = tuple[int, ...]


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


def tokenize(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[Tokens]:
    """Token ids of each prompt by the tokenizer beside a model.

    Every prompt begins with the tokenizer's beginning-of-sequence token, once, if the tokenizer has one, whether or not
    it adds it by itself or the prompt spells it out. No other special token is added: the last token is the prompt's.

    Raises:
        ModelError: there is no tokenizer, it cannot be loaded, or a prompt has no tokens.
        PlanError: transformers is needed for it and not installed.
    """
    tokenizer = load_tokenizer(checkpoint)
    return [_tokens_of(tokenizer, prompt, checkpoint.reference) for prompt in prompts]


def _tokens_of(tokenizer: Tokenizer, prompt: str, reference: str) -> Tokens:
    ids = list(tokenizer.ids(prompt))
    bos = tokenizer.bos
    if bos is not None:
        while ids and ids[0] == bos:
            ids.pop(0)
        ids.insert(0, bos)
    if not ids:
        raise ModelError(f"the tokenizer makes no tokens of the prompt {prompt!r}", where=reference)
    return tuple(ids)


def make_batches(
    tokens: Sequence[Tokens], *, max_tokens: int = MAX_BATCH_TOKENS, equal_lengths: bool = False
) -> list[Batch]:
    """Put prompts of similar lengths together, the shortest first.

    Args:
        tokens: of each prompt.
        max_tokens: of a batch, padding included.
        equal_lengths: let no batch need padding.

    Returns:
        Every prompt once, in batches that depend on nothing but the arguments.
    """
    batches: list[Batch] = []
    chosen: list[int] = []

    def close() -> None:
        if chosen:
            batches.append(Batch(tuple(chosen), tuple(tokens[index] for index in chosen)))
            chosen.clear()

    for index in sorted(range(len(tokens)), key=lambda index: len(tokens[index])):
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
