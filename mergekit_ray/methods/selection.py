"""Exactly k elements of the largest magnitude; of equal ones the lowest flat index first.

The choice depends on the values alone: not on the device, the chunk size or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_ray.methods.order_statistics import Threshold, Values, cut_after, kth_largest
from mergekit_ray.methods.protocol import Operands

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
        magnitudes = values.abs()
        kept = magnitudes > self.threshold
        place = min(max(self.cut - start, 0), values.numel())
        kept[:place] |= magnitudes[:place] == self.threshold
        return kept


def select_largest(operands: Operands, counts: Sequence[int], values: Values) -> list[Selection]:
    """The ``counts[i]`` elements of largest magnitude of ``values(chunk, i)``, for each ``i``.

    Args:
        operands: the tensor.
        counts: ``0 <= count <= operands.num_elements``.
        values: gives the run to rank, as one of the chunk's own tensors; it is overwritten.
    """
    num_elements = operands.num_elements
    ranks = {index: count for index, count in enumerate(counts) if 0 < count < num_elements}
    found = kth_largest(operands, ranks, values) if ranks else {}
    return [
        _selection(found[index], operands, cut_after(operands, index, found[index], values))
        if index in found
        else (Selection(0.0, 0.0, num_elements) if count else Selection(math.inf, math.inf, 0))
        for index, count in enumerate(counts)
    ]


def _selection(threshold: Threshold, operands: Operands, cut: int) -> Selection:
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
