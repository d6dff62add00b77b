"""CABS: conflict-aware and balanced sparsification of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import add_scaled_
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, task_vectors

if TYPE_CHECKING:
    import torch


class CabsModelParameters(Parameters):
    """Per-model parameters of `Cabs`."""

    weight: float = Field(1.0, description="factor on the model's sparse task vector", allow_inf_nan=False)


class CabsParameters(ScaledParameters):
    """Global parameters of `Cabs`."""

    n: int = Field(64, description="elements that a model keeps of every m", ge=0)
    m: int = Field(256, description="consecutive elements in a group", ge=1, le=BLOCK_ELEMENTS)


@METHODS.register("cabs")
class Cabs(ReduceMethod):
    """``b + λ Σ w_i M_i δ_i``: of every ``m`` elements in a row each model in turn keeps the ``n`` largest left to it.

    Yang et al. 2025, "CABS". *Balanced*: n:m pruning by magnitude spreads what is kept over the tensor.
    *Conflict-aware*: models are pruned in the recipe's order, each among the elements that none before it has kept, so
    that no two overlap. The defaults are those of the authors' 7B merges: a quarter of each task vector.

    Groups run over the flattened tensor. What the paper leaves open, here: of a last group of ``g < m`` elements each
    model keeps ``⌈n g / m⌉``; where fewer than ``n`` are left (with more than ``m/n`` models), a model keeps those; a
    change of zero takes no element from the models after it; of equal magnitudes the lowest index is kept. So with
    ``n >= m`` the first model keeps all its changes, and the next only those where the first has none. Models equal to
    the base leave it as it is. The paper tunes the weights and λ on validation data.

    Groups are found in whichever run of elements is being filled, and completed from the neighbouring blocks where they
    cross its ends: quickest where ``m`` divides 2^18.
    """

    name = "cabs"
    summary = "n:m pruning of one task vector after the other, without overlap, and their sum."
    formula = "b + λ·Σ w_i·M_i·δ_i, M_i the n largest |δ_i| of every m elements that no M_j, j < i, holds"
    reference = "https://arxiv.org/abs/2503.01874"
    base = BaseUse.REQUIRED
    model_parameters = CabsModelParameters
    global_parameters = CabsParameters

    def statistics(self, operands: Operands) -> None:
        """None: declared as reducing since a run of elements may need the rest of its first and last group."""
        del operands

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        del statistics
        base, deltas = task_vectors(chunk)
        merged = chunk.scratch.like(base)
        size, start, stop = operands.parameters.m, chunk.start, chunk.stop
        first, last = -(-start // size) * size, stop // size * size
        if first < last:
            inner = slice(first - start, last - start)
            _merge_groups(
                merged[inner].view(-1, size), [delta[inner].view(-1, size) for delta in deltas], operands, chunk
            )
        for group in sorted({start // size, last // size}):
            low, high = group * size, min((group + 1) * size, operands.num_elements)
            part = slice(max(low, start) - start, min(high, stop) - start)
            if part.start >= part.stop or first <= low < last:
                continue
            whole = [delta[part] for delta in deltas] if start <= low and high <= stop else _gather(operands, low, high)
            result = merged[part] if start <= low and high <= stop else merged.new_empty(high - low)
            _merge_groups(result.view(1, -1), [delta.view(1, -1) for delta in whole], operands, chunk)
            merged[part] = result[max(start - low, 0) : min(high, stop) - low]
        add_scaled_(base, merged, operands.parameters.lambda_)
        return base


def _gather(operands: Operands, start: int, stop: int) -> list[torch.Tensor]:
    """All task vectors' elements ``[start, stop)``, read from the blocks that hold them."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    def cut(chunk: Chunk) -> list[torch.Tensor]:
        _, deltas = task_vectors(chunk)
        part = slice(max(start - chunk.start, 0), stop - chunk.start)
        return [delta[part].clone() for delta in deltas]

    size = operands.block_elements
    blocks = range(start // size, (stop - 1) // size + 1)
    parts = [operands.block(block, cut) for block in blocks]
    return [torch.cat([part[index] for part in parts]) for index in range(operands.num_inputs)]


def _merge_groups(out: torch.Tensor, deltas: Sequence[torch.Tensor], operands: Operands, chunk: Chunk) -> None:
    """``Σ w_i M_i δ_i`` of groups, one in each row.

    Args:
        out: ``(groups, elements)``; overwritten.
        deltas: like ``out``; overwritten.
        operands: for n, m and the weights.
        chunk: for scratch.
    """
    import torch  # noqa: PLC0415

    settings: CabsParameters = operands.parameters
    num_kept = -(-settings.n * out.shape[1] // settings.m)
    out.zero_()
    free = chunk.scratch.like(out).fill_(1)
    magnitude = chunk.scratch.like(out)
    for delta, parameters in zip(deltas, operands.input_parameters, strict=True):
        kept = _largest(torch.abs(delta, out=magnitude).mul_(free), num_kept)
        free.masked_fill_(kept, 0)
        out.add_(delta.mul_(parameters.weight).mul_(kept))


def _largest(magnitude: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask of the ``count`` largest of each row, the lowest index first among equals, without zeros."""
    import torch  # noqa: PLC0415

    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    if count >= magnitude.shape[1]:
        return magnitude > 0
    threshold = magnitude.kthvalue(magnitude.shape[1] - count + 1, dim=1, keepdim=True).values
    above = magnitude > threshold
    equal = (magnitude == threshold) & (threshold > 0)
    wanted = count - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= wanted))
