"""Scaling what a trim keeps of a task vector to the L1 norm of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mergekit_ray.methods.shared.protocol import Chunk, Operands
from mergekit_ray.methods.shared.sums import partial_sums, total
from mergekit_ray.methods.shared.task_vectors import task_vector

if TYPE_CHECKING:
    import torch

NEGLIGIBLE_NORM = 1e-7
"""L1 norms below this are not rescaled by or to."""

Trim = Callable[["torch.Tensor", int, int], object]
"""``(delta, index, start)``: zero what is dropped of a run of the task vector of model ``index``, in place."""


def rescaling_factor(whole: Iterable[torch.Tensor], kept: Iterable[torch.Tensor]) -> float:
    """``‖δ‖₁ / ‖δ̃‖₁`` from partial sums of both, 1 where either is below `NEGLIGIBLE_NORM`."""
    norm, kept_norm = total(whole), total(kept)
    return norm / kept_norm if norm >= NEGLIGIBLE_NORM and kept_norm >= NEGLIGIBLE_NORM else 1.0


def rescaling_factors(operands: Operands, trim: Trim) -> list[float]:
    """`rescaling_factor` of each model, in one pass."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    def measure(chunk: Chunk) -> list[tuple[torch.Tensor, torch.Tensor]]:
        wide = chunk.scratch.like(chunk.inputs[0], torch.float64)
        found = []
        for index in range(operands.num_inputs):
            delta = task_vector(chunk, index).abs_()
            whole = partial_sums(wide.copy_(delta), wide)
            trim(delta, index, chunk.start)
            found.append((whole, partial_sums(wide.copy_(delta), wide)))
        return found

    blocks = operands.map_blocks(measure)
    return [
        rescaling_factor((block[index][0] for block in blocks), (block[index][1] for block in blocks))
        for index in range(operands.num_inputs)
    ]
