"""Prompts as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.routing.batches import Tokens
from mergekit_ray.routing.tokenizer import Tokenizer, blamed_on_files, load_tokenizer


def tokenize(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[Tokens]:
    """Token ids of each prompt by the tokenizer beside a model.

    Every prompt begins with the tokenizer's beginning-of-sequence token, once, if the tokenizer has one, whether or not
    it adds it by itself or the prompt spells it out. No other special token is added: the last token is the prompt's.
    An empty prompt has no tokens if there is no such token.

    Raises:
        ModelError: there is no tokenizer, it cannot be loaded or used, or a prompt that is not empty has no tokens.
        PlanError: transformers is needed for it and not installed.
    """
    tokenizer = load_tokenizer(checkpoint)
    with blamed_on_files(checkpoint, "the tokenizer cannot read a prompt"):
        found = [_tokens_of(tokenizer, prompt, checkpoint.reference) for prompt in prompts]
    if not any(found):
        raise ModelError(
            "all prompts are empty, and the tokenizer has no token that begins a text",
            where=checkpoint.reference,
            remedy="write what each expert is for",
        )
    return found


def _tokens_of(tokenizer: Tokenizer, prompt: str, reference: str) -> Tokens:
    ids = list(tokenizer.ids(prompt))
    bos = tokenizer.bos
    if bos is not None:
        while ids and ids[0] == bos:
            ids.pop(0)
        ids.insert(0, bos)
    if not ids and prompt.strip():
        raise ModelError(f"the tokenizer finds no tokens in the prompt {prompt!r}", where=reference)
    return tuple(ids)
