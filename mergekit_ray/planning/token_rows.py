"""A model seen with another vocabulary: which of its rows each token gets, and what a token gets that it lacks.

The rule for a token that a model lacks, the first that applies:

    the recipe names a source               that row, or zeros
    the base model has the token            the base's row
    some models have it                     the mean of their rows, which is one model's row if no other has the token
    only the tokenizer's own model has it   its row
    no token has this id (padding)          the model's own row there, if it has one without a token; else the donor's;
                                            else zeros

With ``force`` the recipe's source also replaces the rows of models that have the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, TypeAlias

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType, promote
from mergekit_ray.core.expressions import ZEROS, Cast, Expression, Merge, Runs, rows
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Model, Operand
from mergekit_ray.planning.vocabulary import vocabulary_axis
from mergekit_ray.planning.weights import Weights

Row: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Models by their place in a list, and a row of each: the mean of these rows. Zeros if there are none."""

NO_ROW: Final[Row] = ((), ())


@dataclass(frozen=True)
class Holder:
    """A model that rows are taken from.

    Attributes:
        model: as it is stored.
        ids: its tokens, each with its row; only those that have one.
        num_rows: of its embedding.
        is_merged: whether it is one of those that are merged, or is only there for single rows.
    """

    model: Model
    ids: Mapping[str, int]
    num_rows: int
    is_merged: bool = True

    @cached_property
    def named(self) -> frozenset[int]:
        """The rows that are a token's."""
        return frozenset(self.ids.values())


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of the output's vocabulary come from.

    Attributes:
        tokens: for each row the token, None for padding.
        holders: every model that has rows.
        base, donor: places in ``holders``; ``base`` is None where the recipe names no base model.
        given: rows that the recipe names, by token.
        forced: tokens whose given row replaces the models' own.
    """

    tokens: Sequence[str | None]
    holders: Sequence[Holder]
    base: int | None
    donor: int
    given: Mapping[str, Row]
    forced: frozenset[str]

    @cached_property
    def _lacking(self) -> list[Row | None]:
        """For each row what a model gets that has no such token; None where nothing has it."""
        return [self._of_padding(i) if token is None else self._of(token) for i, token in enumerate(self.tokens)]

    @property
    def without_source(self) -> list[str]:
        """The tokens that no model has a row for."""
        return [token for token, row in zip(self.tokens, self._lacking, strict=True) if token is not None and not row]

    def of(self, place: int) -> list[Row]:
        """For each row of the output, where a model's comes from: ``place`` is the model's in ``holders``."""
        own = self.holders[place]
        found: list[Row] = []
        for i, (token, lacking) in enumerate(zip(self.tokens, self._lacking, strict=True)):
            if token is None:
                is_own = i < own.num_rows and i not in own.named
                found.append(((place,), (i,)) if is_own else lacking or NO_ROW)
                continue
            row = None if token in self.forced else own.ids.get(token)
            found.append(lacking or NO_ROW if row is None else ((place,), (row,)))
        return found

    def _of(self, token: str) -> Row | None:
        if token in self.given:
            return self.given[token]
        if self.base is not None and (row := self.holders[self.base].ids.get(token)) is not None:
            return (self.base,), (row,)
        for is_merged in (True, False):
            having = [k for k, h in enumerate(self.holders) if h.is_merged is is_merged and token in h.ids]
            if having:
                return tuple(having), tuple(self.holders[k].ids[token] for k in having)
        return None

    def _of_padding(self, i: int) -> Row | None:
        donor = self.holders[self.donor]
        return ((self.donor,), (i,)) if i < donor.num_rows and i not in donor.named else None


class RetokenisedWeights:
    """A model's tensors with a row for each token of another vocabulary. See `mergekit_ray.planning.weights.Weights`.

    Args:
        model: as it is stored.
        holders: every model that rows may come from, itself among them.
        chosen: for each row of the result, where it comes from.
        head: the name of a head that a tied model is to have of its own; None for none.
    """

    def __init__(self, model: Model, holders: Sequence[Model], chosen: Sequence[Row], head: str | None = None) -> None:
        self._model = model
        self._holders = holders
        self._chosen = chosen
        self._head = head
        self._sources = sorted({place for places, _ in chosen for place in places})
        stored = model.weights.specs
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in stored}
        if head is not None and model.anatomy.embedding is not None:
            self.specs = {**self.specs, head: replace(self.specs[model.anatomy.embedding], name=head)}
        self.inputs: Mapping[str, Checkpoint] = {
            **model.weights.inputs,
            **{key: c for place in self._sources for key, c in holders[place].weights.inputs.items()},
        }

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`."""
        if not self._is_of_vocabulary(name):
            return self._model.weights.expression(name, shape)
        spec = self.specs[name] if shape is None else replace(self.specs[name], shape=shape)
        axis = self._axis(name) or 0
        stored = [self._stored(place, name) for place in range(len(self._holders))]
        return _Rows(spec, axis, stored).of(self._chosen[: spec.shape[axis]])

    def _is_of_vocabulary(self, name: str) -> bool:
        return name == self._head or self._axis(name) is not None

    def _axis(self, name: str) -> int | None:
        return 0 if name == self._head else vocabulary_axis(Operand(self._model, name))

    def _spec(self, name: str) -> TensorSpec:
        spec, axis = self._model.weights.specs[name], self._axis(name)
        if axis is None:
            return spec
        shape = _with_rows(spec.shape, axis, len(self._chosen))
        stored = (self._stored(place, name) for place in self._sources)
        dtypes = [weights.specs[theirs].dtype for weights, theirs in filter(None, stored)]
        return TensorSpec(name, promote([spec.dtype, *dtypes]), shape)

    def _stored(self, place: int, name: str) -> tuple[Weights, str] | None:
        """What another model's tensor of the same role is called; None if it has none of that width."""
        model, ours = self._holders[place], self._model
        anatomy = model.anatomy
        if name == ours.anatomy.embedding:
            found = anatomy.embedding
        elif name in (ours.anatomy.head, self._head):
            found = anatomy.head or (anatomy.embedding if anatomy.tied else None)
        else:
            found = name if name in model.weights.specs else None
        axis = None if found is None else vocabulary_axis(Operand(model, found))
        if found is None or axis is None or axis != self._axis(name):
            return None
        like = ours.weights.specs[name if name in ours.weights.specs else str(ours.anatomy.embedding)].shape
        theirs = model.weights.specs[found].shape
        return (model.weights, found) if _with_rows(theirs, axis, 1) == _with_rows(like, axis, 1) else None


@dataclass(frozen=True)
class _Rows:
    """Builds one tensor of rows of others.

    Attributes:
        spec: of the result.
        axis: the dimension that has a place for each token.
        stored: for each model its weights and its tensor's name there; None if it has no such tensor.
    """

    spec: TensorSpec
    axis: int
    stored: Sequence[tuple[Weights, str] | None]

    def of(self, chosen: Sequence[Row]) -> Expression:
        """The tensor with these rows."""
        means: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        runs: list[tuple[tuple[int, ...], int]] = []  # the models of a row, and its place in their part
        for places, numbers in chosen:
            there = tuple(place for place in places if self.stored[place] is not None)
            if len(there) < 2:  # a single model's row, or zeros
                runs.append((there, dict(zip(places, numbers, strict=True))[there[0]] if there else 0))
                continue
            of_mean = means.setdefault(there, [])
            runs.append((there, len(of_mean)))
            of_mean.append(tuple(n for place, n in zip(places, numbers, strict=True) if place in there))
        parts: dict[tuple[int, ...], Expression] = {}
        for there, _ in runs:
            if there and there not in parts:
                parts[there] = self._mean(there, means[there]) if there in means else self._whole(there[0])
        order = {(): ZEROS, **{there: place for place, there in enumerate(parts)}}
        taken = Runs.of_rows([order[there] for there, _ in runs], [row for _, row in runs])
        return rows(tuple(parts.values()), self.spec, taken)

    def _mean(self, places: tuple[int, ...], numbers: Sequence[tuple[int, ...]]) -> Expression:
        inputs = []
        for k, place in enumerate(places):
            taken = Runs.of_rows([0] * len(numbers), [of_row[k] for of_row in numbers])
            inputs.append(rows((self._whole(place),), self._shaped(len(numbers)), taken))
        compute = DType.F64 if self.spec.dtype is DType.F64 else DType.F32
        return Merge(
            method="linear",
            spec=self._shaped(len(numbers)),
            inputs=tuple(inputs),
            base=None,
            parameters={"normalize": True},
            input_parameters=tuple({"weight": 1.0} for _ in places),
            keys=tuple("" for _ in places),
            compute_dtype=compute,
        )

    def _whole(self, place: int) -> Expression:
        """All of a model's tensor, in the result's dtype."""
        found = self.stored[place]
        assert found is not None
        x = found[0].expression(found[1])
        return x if x.spec.dtype is self.spec.dtype else Cast(x, self.spec.dtype)

    def _shaped(self, num_rows: int) -> TensorSpec:
        return replace(self.spec, shape=_with_rows(self.spec.shape, self.axis, num_rows))


def _with_rows(shape: tuple[int, ...], axis: int, num_rows: int) -> tuple[int, ...]:
    return (*shape[:axis], num_rows, *shape[axis + 1 :])
