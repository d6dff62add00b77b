"""A model seen with another one's tokens: the expressions of its embedding and head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mergekit_ray.architectures.anatomy import anatomy, language_config, stating
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.transplant import SUBWORD, TransplantOptions
from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    Approximated,
    Cast,
    Expression,
    Load,
    Merge,
    Noise,
    Runs,
    Scale,
    rows,
)
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Model, Operand
from mergekit_ray.planning.transplant.tokens import TokenRows, Tokens
from mergekit_ray.planning.vocabulary import vocabulary_axis


def transplanted(
    model: Model, donor: Model, tokens: Tokens, options: TransplantOptions, config: Mapping[str, Any]
) -> Model:
    """See a model with a row for each token of a donor.

    Args:
        model: as it is stored.
        donor: whose tokens they are.
        tokens: of both.
        options: how missing rows are made.
        config: of the result, but for ``vocab_size``.
    """
    pieces = _pieces(tokens) if options.method == SUBWORD else None
    weights = TransplantedWeights(model, donor, tokens, options, pieces)
    changed = copy.deepcopy(dict(config))
    for part in stating(changed, "vocab_size") or [cast(dict[str, Any], language_config(changed))]:
        part["vocab_size"] = len(tokens.embedding.chosen)
    parts = anatomy(weights.specs, changed, f"model {model.reference}")
    return replace(model, weights=weights, checkpoint=replace(model.checkpoint, config=changed), anatomy=parts)


class TransplantedWeights:
    """A model's tensors with a row for each token of a donor. See `mergekit_ray.planning.weights.Weights`.

    Args:
        model: as it is stored.
        donor: whose tokens they are.
        tokens: of both.
        options: how missing rows are made.
        pieces: for ``subword``, the model's tokens that each of the donor's missing ones is made of, by its row.
    """

    def __init__(
        self,
        model: Model,
        donor: Model,
        tokens: Tokens,
        options: TransplantOptions,
        pieces: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._model, self._donor = model, donor
        self._tokens, self._options, self._pieces = tokens, options, pieces or {}
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in model.weights.specs}
        self.inputs: Mapping[str, Checkpoint] = {**model.weights.inputs, **donor.weights.inputs}

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`. Tensors of the vocabulary are never cut."""
        axis = vocabulary_axis(Operand(self._model, name))
        if axis is None:
            return self._model.weights.expression(name, shape)
        spec = self.specs[name]
        assert shape in (None, spec.shape)
        found = self._tokens.of(is_head=self._is_head(name))
        own = _cast(self._model.weights.expression(name), spec.dtype)
        missing = found.missing
        if not missing:
            return rows([own], spec, Runs.of_rows([0] * len(found.chosen), [row or 0 for row in found.chosen]))
        made = self._made(name, own, found)
        place = {row: index for index, row in enumerate(missing)}
        part = [1 if row is None else 0 for row in found.chosen]
        row = [place[i] if own_row is None else own_row for i, own_row in enumerate(found.chosen)]
        return rows([own, made], spec, Runs.of_rows(part, row))

    def _spec(self, name: str) -> TensorSpec:
        spec, axis = self._model.weights.specs[name], vocabulary_axis(Operand(self._model, name))
        if axis is None:
            return spec
        size = len(self._tokens.embedding.chosen)
        return replace(spec, shape=(*spec.shape[:axis], size, *spec.shape[axis + 1 :]))

    def _is_head(self, name: str) -> bool:
        return name != self._model.anatomy.embedding

    def _made(self, name: str, own: Expression, found: TokenRows) -> Expression:
        """The rows of missing tokens; a column, if a token has a single number."""
        spec = self.specs[name]
        width = spec.num_elements // len(found.chosen)
        shape = (len(found.missing), width)
        options = self._options
        is_last = options.scale == 1 and options.noise == 0
        made = TensorSpec(name, spec.dtype if is_last else DType.F32, shape)
        key = f"{options.seed}\n{name}"
        if len(spec.shape) != 2 or 1 in own.spec.shape:
            x: Expression = self._like_others(made, own)
        elif options.method == SUBWORD:
            x = self._of_pieces(made, own, found, is_head=self._is_head(name))
        else:
            x = self._approximated(made, own, found, key, is_head=self._is_head(name))
        if options.scale != 1:
            x = Scale(x, options.scale, DType.F32 if options.noise else spec.dtype)
        return Noise(x, "normal", options.noise, f"{key}\nnoise", spec.dtype) if options.noise else x

    @staticmethod
    def _like_others(made: TensorSpec, own: Expression) -> Expression:
        """Of a bias: the mean of all."""
        column = replace(own.spec, shape=(own.spec.num_elements, 1))
        runs = Runs.of([(0, 0, own.spec.num_elements)])
        whole = replace(own, spec=column) if isinstance(own, Load) else rows([own], column, runs)
        return Approximated("mean", made, whole, None, None, {})

    def _approximated(
        self, made: TensorSpec, own: Expression, found: TokenRows, key: str, *, is_head: bool
    ) -> Expression:
        method = APPROXIMATIONS.get(self._options.method)
        donor_shared = donor_missing = None
        model_shared = own if method.uses_model else None
        if method.uses_donor:
            theirs = self._donors(is_head=is_head)
            donor_shared = _taken(theirs, [row for _, row in found.shared])
            donor_missing = _taken(theirs, found.missing)
            model_shared = _taken(own, [row for row, _ in found.shared]) if method.uses_model else None
        parameters = self._options.parameters
        return Approximated(method.name, made, model_shared, donor_shared, donor_missing, parameters, key)

    def _donors(self, *, is_head: bool) -> Expression:
        """The donor's embedding or head. One that is tied has the same rows in both."""
        anatomy = self._donor.anatomy
        head = anatomy.head if is_head and not anatomy.tied else None
        usable = head is not None and len(self._donor.weights.specs[head].shape) == 2
        name = head if usable else anatomy.embedding
        assert name is not None
        return self._donor.weights.expression(name)

    def _of_pieces(self, made: TensorSpec, own: Expression, found: TokenRows, *, is_head: bool) -> Expression:
        """Sums of the model's rows of pieces: one part for all tokens whose pieces have the same weights."""
        by_weights: dict[tuple[float, ...], list[int]] = {}
        for index, row in enumerate(found.missing):
            count = len(self._pieces.get(row, ()))
            by_weights.setdefault(piece_weights(self._options.subword, count, is_head=is_head), []).append(index)
        parts: list[Expression] = []
        where = [(0, 0)] * len(found.missing)
        for weights, indices in by_weights.items():
            spec = replace(made, shape=(len(indices), made.shape[1]))
            if weights:
                pieces = [self._pieces[found.missing[index]] for index in indices]
                parts.append(_sum(spec, own, weights, pieces))
            else:  # text that the model has no tokens for
                parts.append(Approximated("mean", spec, own, None, None, {}))
            for place, index in enumerate(indices):
                where[index] = (len(parts) - 1, place)
        return rows(parts, made, Runs.of_rows([part for part, _ in where], [place for _, place in where]))


def _pieces(tokens: Tokens) -> dict[int, Sequence[int]]:
    """The model's tokens of each missing one's text."""
    from mergekit_ray.tokenizers.encoding import pieces_of  # noqa: PLC0415 - imports the tokenizers library

    names = tokens.donor.names()
    missing = {row for found in (tokens.embedding, tokens.head) for row in found.missing if row in names}
    return pieces_of(tokens.model, tokens.donor, sorted(missing))


def piece_weights(scheme: str, count: int, *, is_head: bool) -> tuple[float, ...]:
    """How the rows of a token's pieces are weighed.

    Args:
        scheme: ``mean`` and ``sum`` treat all alike. ``weighted_mean`` weighs them from ``count`` down to 1 in the
            embedding, and in the head the other way round. ``first_last`` takes the last one in the embedding, where
            the text goes on, and the first in the head, which is what would have been said next.
        count: of pieces.
        is_head: for the head.
    """
    if not count:
        return ()
    match scheme:
        case "sum":
            found = [1.0] * count
        case "mean":
            found = [1.0 / count] * count
        case "weighted_mean":
            total = count * (count + 1) / 2
            found = [(count - i) / total for i in range(count)]
            found = found[::-1] if is_head else found
        case _:
            found = [1.0 if i == (0 if is_head else count - 1) else 0.0 for i in range(count)]
    return tuple(found)


def _sum(spec: TensorSpec, own: Expression, weights: Sequence[float], pieces: Sequence[Sequence[int]]) -> Expression:
    used = [i for i, weight in enumerate(weights) if weight]
    return Merge(
        method="linear",
        spec=spec,
        inputs=tuple(_taken(own, [of_token[i] for of_token in pieces]) for i in used),
        base=None,
        parameters={"normalize": False},
        input_parameters=tuple({"weight": weights[i]} for i in used),
        keys=tuple("" for _ in used),
    )


def _taken(x: Expression, picked: Sequence[int]) -> Expression:
    """Some rows of a matrix."""
    spec = replace(x.spec, shape=(len(picked), *x.spec.shape[1:]))
    return rows([x], spec, Runs.of_rows([0] * len(picked), list(picked)))


def _cast(x: Expression, dtype: DType) -> Expression:
    return x if x.spec.dtype is dtype else Cast(x, dtype)
