"""Exactly k elements of the largest magnitude; of equal ones the lowest flat index first.

The choice depends on the values alone: not on the device, the chunk size or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.order_statistics import Threshold, Values, cut_after, kth_largest
from mergekit_ray.methods.shared.protocol import Operands

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Selection:
    """Which elements of a tensor are kept.

    Attributes:
        threshold: the smallest magnitude kept; infinity if none is.
        below: the next smaller magnitude of the compute dtype (0 for 0).
        cut: elements equal to the threshold are kept before this flat index.
    """

    threshold: float
    below: float
    cut: int

    def limit_at(self, index: int) -> float:
        """The magnitude that those that are kept from this flat index on are above, up to the cut or the end."""
        return self.below if index < self.cut else self.threshold

    def trim_(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Zero what is not kept, in place.

        Args:
            values: 1-D run of the values that were ranked (with their signs).
            start: flat index of its first element.
        """
        if self.threshold == 0.0:
            return values  # everything but zeros is kept
        place = min(max(self.cut - start, 0), values.numel())
        _shrink_(values[:place], self.below)
        _shrink_(values[place:], self.threshold)
        return values

    def mask(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Boolean mask of what is kept; arguments as for `trim_`, ``values`` is not changed."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        return self.flag_(values.clone(), start, values.new_empty(values.shape, dtype=torch.bool))

    def flag_(self, values: torch.Tensor, start: int, out: torch.Tensor) -> torch.Tensor:
        """`mask` into ``out``, boolean, without any other memory: ``values`` become their magnitudes."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        place = min(max(self.cut - start, 0), values.numel())
        values.abs_()
        torch.ge(values[:place], self.threshold, out=out[:place])
        torch.gt(values[place:], self.threshold, out=out[place:])
        return out


@dataclass(frozen=True, slots=True)
class Band:
    """Which elements of a tensor are kept where the largest are dropped, too.

    Attributes:
        largest: what the band ends at: the dropped and the kept ones.
        dropped: the part of them that is dropped.
    """

    largest: Selection
    dropped: Selection

    def trim_(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Zero what is not kept, in place; arguments as for `Selection.trim_`."""
        cuts = {min(max(cut - start, 0), values.numel()) for cut in (self.largest.cut, self.dropped.cut)}
        for first, last in pairwise(sorted({0, *cuts, values.numel()})):
            _keep_between_(
                values[first:last], self.largest.limit_at(start + first), self.dropped.limit_at(start + first)
            )
        return values

    def mask(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Boolean mask of what is kept; arguments as for `trim_`, ``values`` is not changed."""
        return self.largest.mask(values, start) & ~self.dropped.mask(values, start)


def select_largest(operands: Operands, counts: Sequence[int], values: Values) -> list[Selection]:
    """The ``counts[i]`` elements of largest magnitude of ``values(chunk, i)``, for each ``i``.

    Args:
        operands: the tensor.
        counts: ``0 <= count <= operands.num_elements``.
        values: gives the run to rank, as one of the chunk's own tensors; it is overwritten.
    """
    return _select(operands, dict(enumerate(counts)), values, lambda place: place)


def select_next_largest(
    operands: Operands, dropped: Sequence[int], counts: Sequence[int], values: Values
) -> list[Band]:
    """Of ``values(chunk, i)`` without the ``dropped[i]`` of largest magnitude, the next ``counts[i]``, for each ``i``.

    Of equal magnitudes the lowest flat index counts as the largest. Both ends are found in one pass.

    Args:
        operands: the tensor.
        dropped: not negative.
        counts: not negative; ``dropped[i] + counts[i] <= operands.num_elements``.
        values: as for `select_largest`.
    """
    number = len(counts)
    ends = [*dropped, *(more + count for more, count in zip(dropped, counts, strict=True))]
    selections = _select(operands, dict(enumerate(ends)), values, lambda place: place % number)
    return [Band(selections[place + number], selections[place]) for place in range(number)]


def _select(
    operands: Operands, counts: Mapping[int, int], values: Values, index_of: Callable[[int], int]
) -> list[Selection]:
    num_elements = operands.num_elements
    ranks = {place: count for place, count in counts.items() if 0 < count < num_elements}
    found = kth_largest(operands, ranks, values, index_of) if ranks else {}
    return [
        selection_at(found[place], operands, cut_after(operands, index_of(place), found[place], values))
        if place in found
        else (Selection(0.0, 0.0, num_elements) if count else Selection(math.inf, math.inf, 0))
        for place, count in counts.items()
    ]


def selection_at(threshold: Threshold, operands: Operands, cut: int) -> Selection:
    """What is above a threshold, and of its equals those before the flat index ``cut``."""
    pattern = threshold.pattern
    return Selection(_magnitude(pattern, operands), _magnitude(max(pattern - 1, 0), operands), cut)


def _magnitude(pattern: int, operands: Operands) -> float:
    """The number whose bits are ``pattern``."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[operands.compute_dtype.itemsize]
    return float(torch.tensor([pattern], dtype=integers).view(operands.compute_dtype))


def _shrink_(values: torch.Tensor, limit: float) -> None:
    """Zero magnitudes up to ``limit``: one pass and no mask in memory."""
    import torch  # noqa: PLC0415

    if values.numel():
        torch.ops.aten.hardshrink.out(values, limit, out=values)


def _keep_between_(values: torch.Tensor, low: float, high: float) -> None:
    """Zero magnitudes up to ``low`` and above ``high``."""
    if is_compiled_for(values):
        from mergekit_ray.methods.compiled import selection  # noqa: PLC0415 - compilers load where they are needed

        run = values.numpy()
        selection.keep_between(run, run.dtype.type(low), run.dtype.type(high))
    else:
        magnitudes = values.abs()
        values.masked_fill_((magnitudes <= low) | (magnitudes > high), 0.0)
