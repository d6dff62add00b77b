"""Arcee Fusion: take over the changes that stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.order_statistics import collected_bytes, kth_largest
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.rows import Lines
from mergekit_ray.methods.shared.scratch import Scratch

if TYPE_CHECKING:
    import torch

SMALLEST_PROBABILITY = 1e-8
"""Added to softmax values before their logarithms are taken."""

_ROUNDING = 1e-28
"""Divergences below this are those of rows that differ by the rounding of float64 alone, such as by a constant."""

_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Importance:
    """What the passes over the whole tensor found.

    Attributes:
        rows: the vectors along the last dimension.
        divergence: of each row in compute dtype, times a power of two that brings the largest near 1.
        threshold: of ``|x − b| · divergence``.
    """

    rows: Lines
    divergence: torch.Tensor
    threshold: float


@METHODS.register("arcee_fusion")
class ArceeFusion(ReduceMethod):
    """Elements of the other model where the change is important, of the base elsewhere.

    Importance is ``|x − b| · KL(p ‖ q)``: ``p`` and ``q`` are the softmax of ``x`` and ``b`` along the last dimension
    (a vector is one row), each plus 1e-8, and one divergence ``Σ p ln(p/q)`` belongs to all elements of a row. What is
    kept has an importance of ``median + 1.5 · (Q3 − Q1)`` or more. Quartiles are elements: the one of rank
    ``⌊q (n − 1)⌋`` (from 0) in ascending order, without interpolation, and exact for tensors of any size.

    Divergences are calculated in float64: those of models that differ by 1e-3 are some 1e-7, which float32 cannot tell
    from rounding. Rows of one element, and rows that differ by a constant, have divergence 0. Where all importance is
    equal, all elements are kept.
    """

    name = "arcee_fusion"
    summary = "Take the other model where a change's importance stands out, and the base elsewhere."
    formula = (
        "x where |x - b|·KL(softmax(x) ‖ softmax(b)) >= median + 1.5·(Q3 - Q1) of it, else b; softmax over the last dim"
    )
    base = BaseUse.REQUIRED
    base_is_input = True
    max_models = 1
    propagates_non_finite = True
    portable = False  # exponentials decide what is kept

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        del num_models
        return collected_bytes(math.prod(shape), len(_QUARTILES), itemsize)

    def statistics(self, operands: Operands) -> Importance | None:
        """Divergences and threshold; None for a tensor without elements."""
        if not operands.num_elements:
            return None
        rows = Lines.along_last(operands.shape)
        divergence = scaled(divergences(operands, rows)).to(operands.compute_dtype)
        return Importance(rows, divergence, _threshold(operands, rows, divergence))

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is the `Importance`."""
        del operands
        found: Importance = statistics
        x, base = _pair(chunk)
        weighed = _importance(chunk, found.rows, found.divergence)
        if is_compiled_for(x):
            from mergekit_ray.methods.compiled import divergence  # noqa: PLC0415 - compilers load where they are needed

            divergence.take_important(x.numpy(), base.numpy(), weighed.numpy(), found.threshold)
            return x
        kept = weighed.ge_(found.threshold)
        x.mul_(kept)
        return base.mul_(kept.neg_().add_(1.0)).add_(x)


def divergences(operands: Operands, rows: Lines) -> torch.Tensor:
    """``KL(p ‖ q)`` of each row, in float64, on the CPU."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    from mergekit_ray.methods.compiled import divergence  # noqa: PLC0415 - compilers load where they are needed

    def measure(chunk: Chunk) -> torch.Tensor:
        x, base = (_wide(run, chunk.scratch).numpy() for run in _pair(chunk))
        found = torch.empty(x.size // rows.num_columns, dtype=torch.float64)
        divergence.of_rows(x, base, rows.num_columns, SMALLEST_PROBABILITY, found.numpy())
        return found

    # A row longer than a block is seen at one go nevertheless.
    rows_per_block = max(operands.block_elements // rows.num_columns, 1)
    found = torch.cat(operands.map_blocks(measure, rows_per_block * rows.num_columns))
    return torch.where(found < _ROUNDING, 0.0, found)


def scaled(divergence: torch.Tensor) -> torch.Tensor:
    """Times a power of two that brings the largest near 1, so that products with differences stay in range.

    What is kept is the same: importance and threshold are scaled alike, and exactly.
    """
    largest = float(divergence.max())
    if largest == 0.0 or not math.isfinite(largest):
        return divergence
    return divergence * math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))


def _pair(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    assert chunk.base is not None
    return chunk.inputs[0], chunk.base


def _wide(run: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """As numbers that the compiled loops take."""
    import torch  # noqa: PLC0415

    return run if is_compiled_for(run) else scratch.like(run, torch.float32).copy_(run)


def _importance(chunk: Chunk, rows: Lines, divergence: torch.Tensor) -> torch.Tensor:
    """``|x − b|`` times the divergence of the row; the chunk's tensors stay as they are."""
    import torch  # noqa: PLC0415

    x, base = _pair(chunk)
    if is_compiled_for(x):
        from mergekit_ray.methods.compiled import divergence as compiled  # noqa: PLC0415 - where they are needed

        out = chunk.scratch.like(x)
        compiled.importance(x.numpy(), base.numpy(), chunk.start, rows.num_columns, divergence.numpy(), out.numpy())
        return out
    return rows.scale_(torch.sub(x, base, out=chunk.scratch.like(x)).abs_(), chunk.start, divergence)


def _threshold(operands: Operands, rows: Lines, divergence: torch.Tensor) -> float:
    """The least number of the compute dtype that is not below ``median + 1.5 · (Q3 − Q1)``."""
    import torch  # noqa: PLC0415

    last = operands.num_elements - 1
    ranks = {place: operands.num_elements - math.floor(part * last) for place, part in enumerate(_QUARTILES)}
    found = kth_largest(operands, ranks, lambda chunk, _: _importance(chunk, rows, divergence), index_of=lambda _: 0)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[operands.compute_dtype.itemsize]
    patterns = torch.tensor([found[place].pattern for place in ranks], dtype=integers)
    first, median, third = patterns.view(operands.compute_dtype).tolist()
    limit = median + 1.5 * (third - first)
    threshold = torch.tensor(limit, dtype=operands.compute_dtype)
    if float(threshold) < limit:
        threshold = torch.nextafter(threshold, torch.tensor(math.inf, dtype=operands.compute_dtype))
    return float(threshold)
