"""Which row of the model each of the donor's tokens has, and which tokens both share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from mergekit_ray.config.transplant import SUBWORD, TransplantOptions
from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.planning.lowering import Model
from mergekit_ray.tokenizers.files import shown
from mergekit_ray.tokenizers.matching import matches
from mergekit_ray.tokenizers.reading import Tokenizer, read_tokenizer

_MAX_NAMED: Final = 3

_FEW: Final = 10
"""A warning is due if fewer than one of so many tokens are shared."""


@dataclass(frozen=True)
class TokenRows:
    """Rows of the model for the donor's tokens.

    Attributes:
        chosen: for each row of the result a row of the model; None for one that is approximated.
        shared: tokens that both have, each with its row in the model and in the donor.
    """

    chosen: Sequence[int | None]
    shared: Sequence[tuple[int, int]]

    @property
    def missing(self) -> list[int]:
        """The rows that are approximated: also their indices in the donor."""
        return [row for row, own in enumerate(self.chosen) if own is None]


@dataclass(frozen=True)
class Tokens:
    """The tokens of both models.

    Attributes:
        model, donor: the tokenizers.
        embedding: rows of the embedding.
        head: rows of the head, and of what goes with it.
    """

    model: Tokenizer
    donor: Tokenizer
    embedding: TokenRows
    head: TokenRows

    def of(self, *, is_head: bool) -> TokenRows:
        """Of one of the two."""
        return self.head if is_head else self.embedding


def tokens_of(
    model: Model,
    donor: Model,
    options: TransplantOptions,
    hardly_trained: tuple[Collection[int], Collection[int]] = ((), ()),
) -> Tokens:
    """Match the tokens of two models.

    There are as many rows as the donor has. Rows without a token (padding) are approximated from the donor's.

    Args:
        model: that gets new tokens.
        donor: whose tokens it gets.
        options: ways to match tokens.
        hardly_trained: rows of the model and of the donor that are not shared, whatever their tokens.

    Raises:
        ModelError: one of them has no embedding or no tokenizer.
        PlanError: they share no token, or the donor has no row for a token that the model lacks.
        CheckpointError, StorageError: a tokenizer could not be read.
    """
    ours, theirs = _read(model), _read(donor)
    found = matches(ours, theirs)
    num_ours, num_theirs = _num_rows(model), _num_rows(donor)
    size = max(num_theirs, 1 + max(theirs.ids.values(), default=-1))
    out, out_theirs = (frozenset(rows) for rows in hardly_trained)
    same = {i: row for i, row in found.same.items() if row < num_ours and row not in out and i not in out_theirs}

    def rows(*, is_head: bool) -> TokenRows:
        alike = dict(same)
        if options.matches(options.byte_match, is_head=is_head):
            alike |= {i: row for i, row in found.by_byte.items() if row < num_ours}
        chosen = dict(alike)
        if options.matches(options.prefix_match, is_head=is_head):
            chosen = {**{i: row for i, row in found.by_prefix.items() if row < num_ours}, **chosen}
        shared = sorted((row, i) for i, row in alike.items() if i < num_theirs)
        return TokenRows([chosen.get(i) for i in range(size)], shared)

    tokens = Tokens(ours, theirs, rows(is_head=False), rows(is_head=True))
    needs_shared = options.method != SUBWORD and APPROXIMATIONS.get(options.method).uses_donor
    _check(tokens, num_theirs, model, donor, needs_shared=needs_shared)
    return tokens


def few_shared(tokens: Tokens) -> list[str]:
    """A warning, if the two models have little in common."""
    shared, missing = len(tokens.embedding.shared), len(tokens.embedding.missing)
    if shared * _FEW >= len(tokens.embedding.chosen):
        return []
    return [f"only {counted(shared, 'token')} of {shared + missing} are in both models: the others' rows are rough"]


def _check(tokens: Tokens, num_rows: int, model: Model, donor: Model, *, needs_shared: bool) -> None:
    for rows in (tokens.embedding, tokens.head):
        if needs_shared and rows.missing and not rows.shared:
            raise PlanError(
                f"{model.reference} and {donor.reference} have no token in common, so there is nothing to approximate "
                "rows from",
                remedy="choose another donor, a method that needs no common tokens (subword, mean, zero, randn, "
                "john_hewitt), or `byte_match='yes'` if one has tokens for single bytes",
            )
        lost = [row for row in rows.missing if row >= num_rows]
        if lost:
            names = tokens.donor.names()
            named = ", ".join(shown(names[row]) for row in lost[:_MAX_NAMED])
            raise PlanError(
                f"the donor has no row for {counted(len(lost), 'token')} of its own that the model lacks: {named}"
                + (", ..." if len(lost) > _MAX_NAMED else ""),
                where=f"model {donor.reference}",
                remedy="give the donor's embedding a row for each token (transformers' resize_token_embeddings)",
            )


def _read(model: Model) -> Tokenizer:
    found = read_tokenizer(model.checkpoint)
    if found is None:
        raise ModelError(
            "there is no tokenizer beside the model, and tokens are matched by their text",
            where=f"model {model.reference}",
            remedy="copy the tokenizer's files to the model",
        )
    return found


def _num_rows(model: Model) -> int:
    if model.anatomy.embedding is None:
        raise ModelError("the model has no embedding", where=f"model {model.reference}", remedy="name a language model")
    return model.weights.specs[model.anatomy.embedding].shape[0]
