"""Sums of tensors as stored in files, by compiled loops, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Expression, Merge, Stored
from mergekit_ray.core.registry import METHODS
from mergekit_ray.evaluation.pieces import Bytes, Filling, Pieces
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.methods.shared.combinations import Clamped, Interpolation, Kept, Sum
from mergekit_ray.methods.shared.gram import DOT_ELEMENTS, num_products, summed_products
from mergekit_ray.methods.shared.numbers import INPUT, Number, formula_of
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, SumMethod
from mergekit_ray.methods.shared.random_mask import RandomMask, stream
from mergekit_ray.methods.shared.sign import zero_divisor

BITS: Final[dict[DType, type[np.unsignedinteger[Any]]]] = {DType.BF16: np.uint16, DType.F32: np.uint32}
"""Dtypes of what masks drop some of, and of routers; and what carries their bits."""

_Integers = np.ndarray[Any, np.dtype[np.int64]]

_Compute = Callable[[int, int, int], bool]
"""Writes so many elements from a flat index on to an address; says whether all is finite."""

_RUN_ELEMENTS: Final = 1 << 14
"""Elements that a thread is given at least."""


class CompiledSum:
    """A sum of tensors as stored in files, or of their changes.

    Args:
        merge: by a `SumMethod`.
        vectors: what is summed: the inputs, after the base if that is one of them.
        base: what is subtracted from each, and added to the sum; None without one.
    """

    def __init__(self, merge: Merge, vectors: Sequence[Stored], base: Stored | None) -> None:
        self._merge = merge
        self._vectors = vectors
        self._base = base

    @staticmethod
    def objection(expression: Expression) -> str | None:
        """Why an expression is not of this kind, in words; None if it is."""
        if not isinstance(expression, Merge):
            return f"there are no compiled loops for {expression.kind}"
        method = METHODS.get(expression.method)
        if not issubclass(method, SumMethod):
            return f"{expression.method} has no compiled loop"
        if expression.compute_dtype is not DType.F32:
            return (
                f"the compiled loops compute in float32, and the recipe asks for {expression.compute_dtype.config_name}"
            )
        for x in (expression, *_read_by(expression)):
            if not x.spec.dtype.is_floating or (x.spec.dtype not in BITS and method.masks):
                taken = "bfloat16 and float32" if method.masks else "floating dtypes of 16 bits and more"
                return (
                    f"the compiled loops of {expression.method} take {taken}, and one tensor is "
                    f"{x.spec.dtype.config_name}"
                )
        if not all(isinstance(x, Stored) for x in _read_by(expression)):
            return "the compiled loops read tensors straight from files, and one input is computed first"
        return None

    @classmethod
    def of(cls, expression: Expression) -> Self | None:
        """The same as an expression; None if `objection` has something to say."""
        if cls.objection(expression) is not None or not isinstance(expression, Merge):
            return None
        method = METHODS.get(expression.method)
        leaves = [x for x in _read_by(expression) if isinstance(x, Stored)]
        if expression.base is None:
            return cls(expression, leaves, None)
        *inputs, base = leaves
        return cls(expression, [base, *inputs], None) if method.base_is_input else cls(expression, inputs, base)

    def begin(self, pieces: Pieces, pool: ComputePool) -> Filling | None:
        """See `Compiled.begin`."""
        method = METHODS.get(self._merge.method)
        assert issubclass(method, SumMethod)  # seen to by `of`
        vectors = _Runs.of(self._vectors, pieces)
        base = None if self._base is None else _Runs.of([self._base], pieces)
        if not vectors.are_aligned or (base is not None and not base.are_aligned):
            return None
        try:
            how = method.sum_of(_Tensor(self._merge, vectors, base, pool))
        except MergeError:
            return None  # the evaluator says it, and of which tensor
        if how is None or (isinstance(how, Kept) and not method.masks):
            return None
        width = self._merge.spec.dtype.itemsize
        compute = self._kept(how, vectors, base) if isinstance(how, Kept) else self._stored(how, vectors, base)

        def fill(start: int, out: Bytes) -> bool:
            num_elements = out.size // width

            def run(first: int, last: int) -> bool:
                low = first * _RUN_ELEMENTS
                size = min(last * _RUN_ELEMENTS, num_elements) - low
                return compute(start + low, _address(out) + low * width, size)

            return all(pool.map_runs(-(-num_elements // _RUN_ELEMENTS), run))

        return fill

    def _stored(self, how: Sum | Interpolation | Clamped, vectors: _Runs, base: _Runs | None) -> _Compute:
        """Of tensors as they are."""
        from mergekit_ray.methods.compiled import formula_loops  # noqa: PLC0415 - LLVM loads where something is computed

        inputs = vectors if base is None else vectors.and_of(base)
        numbers = [Number(INPUT, index=place) for place in range(len(inputs.dtypes))]
        of_vectors, of_base = (numbers, None) if base is None else (numbers[:-1], numbers[-1])
        formula, values = formula_of(how.formula(of_vectors, of_base))
        scalars = np.array(values, np.float32)
        sees_inputs = not METHODS.get(self._merge.method).propagates_non_finite
        loop = formula_loops.loop(formula, inputs.dtypes, self._merge.spec.dtype, sees_inputs=sees_inputs)

        def compute(start: int, out: int, size: int) -> bool:
            return loop(inputs.at(start), scalars, out, size)

        return compute

    def _kept(self, kept: Kept, vectors: _Runs, base: _Runs | None) -> _Compute:
        """Of what masks keep of changes."""
        from mergekit_ray.methods.compiled import kept_sums  # noqa: PLC0415 - numba loads where something is computed

        how, width = kept.how, self._merge.spec.dtype.itemsize
        factors = np.array(how.factors, np.float32)

        def compute(start: int, out: int, size: int) -> bool:
            masks = _words(kept.masks, start, size)
            common = vectors.at(start), vectors.widths, _place_of(base, start), masks, factors
            if isinstance(how, Sum):
                steps = how.rounds_products, np.float32(how.divisor), np.float32(how.scale)
                return bool(kept_sums.sum_of_kept(*common, steps, (out, width), size))
            negligible = zero_divisor(how.weights, float(np.finfo(np.float32).eps)) if how.normalize else math.inf
            election = np.array(how.weights, np.float32), np.float32(how.scale), np.float32(negligible)
            return bool(kept_sums.elected_of_kept(*common, election, (out, width), size))

        return compute


def _read_by(merge: Merge) -> list[Expression]:
    """Inputs, then the base if there is one."""
    return [*merge.inputs, *([] if merge.base is None else [merge.base])]


@dataclass(frozen=True, slots=True)
class _Runs:
    """What was read of some tensors.

    Attributes:
        addresses: of the first element that each tensor has, or would have, in memory: int64.
        widths: of their elements, bytes: int64.
        dtypes: of the tensors.
        data: the memory itself, which lives as long as this.
    """

    addresses: _Integers
    widths: _Integers
    dtypes: Sequence[DType]
    data: Sequence[Bytes]

    @classmethod
    def of(cls, leaves: Sequence[Stored], pieces: Pieces) -> Self:
        widths = [leaf.spec.dtype.itemsize for leaf in leaves]
        data, starts = zip(*(pieces[leaf] for leaf in leaves), strict=True)
        addresses = [_address(x) - start * width for x, start, width in zip(data, starts, widths, strict=True)]
        dtypes = [leaf.spec.dtype for leaf in leaves]
        return cls(np.array(addresses, np.int64), np.array(widths, np.int64), dtypes, data)

    def and_of(self, other: Self) -> Self:
        """These, and those of others behind them."""
        return type(self)(
            np.concatenate([self.addresses, other.addresses]),
            np.concatenate([self.widths, other.widths]),
            [*self.dtypes, *other.dtypes],
            [*self.data, *other.data],
        )

    @property
    def are_aligned(self) -> bool:
        """Whether every element is aligned."""
        return not (self.addresses % self.widths).any()

    def at(self, element: int) -> _Integers:
        """The addresses of the elements with a flat index."""
        return self.addresses + element * self.widths


def _address(data: Bytes) -> int:
    address: int = data.__array_interface__["data"][0]
    return address


class _Tensor:
    """See `SummedTensor`."""

    def __init__(self, merge: Merge, vectors: _Runs, base: _Runs | None, pool: ComputePool) -> None:
        method = METHODS.get(merge.method)
        self.shape = merge.spec.shape
        self.parameters: Any = method.global_parameters.model_validate(dict(merge.parameters))
        self.input_parameters: Sequence[Any] = [
            method.model_parameters.model_validate(dict(each)) for each in merge.input_parameters
        ]
        self.keys = merge.keys
        self._num_elements = merge.spec.num_elements
        self._vectors, self._base, self._pool = vectors, base, pool

    def inner_products(self) -> list[float]:
        """See `SummedTensor.inner_products`."""
        from mergekit_ray.methods.compiled import products  # noqa: PLC0415 - as above

        num_pairs = num_products(len(self._vectors.widths))
        inputs = self._vectors if self._base is None else self._vectors.and_of(self._base)

        def run(first: int, last: int) -> np.ndarray[Any, np.dtype[np.float64]]:
            start = first * DOT_ELEMENTS
            size = min(last * DOT_ELEMENTS, self._num_elements) - start
            has_base = self._base is not None
            return products.inner_products(inputs.at(start), inputs.dtypes, size, DOT_ELEMENTS, has_base=has_base)

        parts = np.concatenate(self._pool.map_runs(-(-self._num_elements // DOT_ELEMENTS), run))
        return summed_products([parts.T.tolist()], num_pairs)

    def masked_norms(self, masks: Sequence[RandomMask]) -> list[tuple[float, float]]:
        """See `SummedTensor.masked_norms`."""
        from mergekit_ray.methods.compiled import kept_sums  # noqa: PLC0415 - as above

        def run(first: int, last: int) -> np.ndarray[Any, np.dtype[np.float64]]:
            found = np.empty((last - first, len(masks), 2))
            start = first * BLOCK_ELEMENTS
            size = min(last * BLOCK_ELEMENTS, self._num_elements) - start
            kept_sums.norms_of_kept(
                self._vectors.at(start),
                self._vectors.widths,
                _place_of(self._base, start),
                _words(masks, start, size),
                size,
                BLOCK_ELEMENTS,
                found,
            )
            return found

        parts = np.concatenate(self._pool.map_runs(-(-self._num_elements // BLOCK_ELEMENTS), run))
        return [(math.fsum(parts[:, k, 0]), math.fsum(parts[:, k, 1])) for k in range(len(masks))]


def _place_of(base: _Runs | None, element: int) -> tuple[int, int]:
    """The address of an element of the base, and the width; 0 and 0 without one."""
    return (0, 0) if base is None else (int(base.at(element)[0]), int(base.widths[0]))


def _words(masks: Sequence[RandomMask], start: int, size: int) -> tuple[int, Any, Any, _Integers]:
    """What `kept_sums.Masks` are of a run."""
    offsets, tables, keys = zip(*(stream(mask.key, start, size) for mask in masks), strict=True)
    return offsets[0], tables[0], np.stack(keys), np.array([mask.limit for mask in masks], np.int64)
