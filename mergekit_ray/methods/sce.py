"""SCE: select, calculate, erase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.accumulate import divide_
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.methods.shared.packed_mask import MaskBuilder, PackedMask, mask_bytes, trim_
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.selection import Selection, select_largest
from mergekit_ray.methods.shared.sums import partial_sums, total
from mergekit_ray.methods.shared.task_vectors import task_vector, task_vectors

if TYPE_CHECKING:
    import torch

LEAST_DIVISOR = 1e-6
"""Sums of weights below this are not divided by."""


class SceParameters(Parameters):
    """Global parameters of `Sce`."""

    select_topk: float = Field(
        1.0, description="part of the elements where models differ that is merged; 1 merges all", ge=0.0, le=1.0
    )
    int8_mask: bool = Field(False, description="accepted, without effect on the result")


@dataclass(frozen=True, slots=True)
class SceStatistics:
    """What the passes over the whole tensor found.

    Attributes:
        weights: of the models; they sum to 1, or are all 0 where nothing that is selected differs from the base.
        mask: the selected elements, or None for all.
    """

    weights: Sequence[float]
    mask: PackedMask | None


@METHODS.register("sce")
class Sce(ReduceMethod):
    """Merge the elements where models differ most; models weigh by their energy there; signs are elected.

    Wan et al. 2024, "FuseChat", arXiv 2408.07990. Per tensor, with ``N`` models:

    1. Select: of the ``z`` elements where the variance of ``δ_1 … δ_N`` is not 0, the ``⌊select_topk·z⌋`` of highest
       variance; of equal ones the lowest flat index first. All others become the base's. A ``select_topk`` of 1 selects
       all elements, also those of variance 0; below 1 nothing is left of a single model, which varies from none.
    2. Calculate: ``w_i = Σ δ_i² / Σ_j Σ δ_j²`` over the selected elements, in float64.
    3. Erase: the sign of ``Σ δ_i``, zero counted as positive; ``m_i = [sign(δ_i) = s]``.

    The result is ``b + Σ w_i m_i δ_i / max(Σ w_i m_i, 1e-6)``. Variances are calculated in compute dtype: those below
    its range are zeros.
    """

    name = "sce"
    summary = "Select the elements of highest variance, weigh models by their energy, elect a sign, merge what agrees."
    formula = "b + Σ w_i·m_i·δ_i / max(Σ w_i·m_i, 1e-6) where selected; w_i ∝ Σ δ_i²; m_i = [sign(δ_i) = sign(Σ δ_j)]"
    reference = "https://arxiv.org/abs/2408.07990"
    base = BaseUse.REQUIRED
    global_parameters = SceParameters

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        del num_models
        return collected_bytes(math.prod(shape), 1, itemsize) + mask_bytes(math.prod(shape))

    def statistics(self, operands: Operands) -> SceStatistics:
        """Selection and weights."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        selection = None
        if operands.parameters.select_topk < 1.0:
            counts = operands.map_blocks(lambda chunk: variances(chunk).count_nonzero())
            num_varying = int(torch.stack(counts).sum()) if counts else 0
            count = math.floor(operands.parameters.select_topk * num_varying)
            selection = select_largest(operands, [count], lambda chunk, _: variances(chunk))[0]

        builder = MaskBuilder(operands.num_elements)

        def measure(chunk: Chunk) -> list[torch.Tensor]:
            kept = _selected(chunk, selection)
            if selection is not None:
                builder.put(kept, chunk.start)
            return energies(chunk, kept)

        blocks = operands.map_blocks(measure)
        sums = [total(block[index] for block in blocks) for index in range(operands.num_inputs)]
        whole = math.fsum(sums)
        weights = [energy / whole if whole else 0.0 for energy in sums]
        return SceStatistics(weights, builder.mask())

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the `SceStatistics`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        del operands
        found: SceStatistics = statistics
        if found.mask is None:
            kept = chunk.scratch.like(chunk.inputs[0], torch.uint8).fill_(1)
        else:
            kept = found.mask.unpack(chunk.start, chunk.stop - chunk.start)
        return fuse_(chunk, kept, found.weights)


def variances(chunk: Chunk) -> torch.Tensor:
    """``N`` times the variance of the task vectors, which orders elements as the variance does; in scratch."""
    assert chunk.base is not None  # held by the declaration: base REQUIRED
    if not is_compiled_for(chunk.base):
        return variances_by_torch(chunk)
    from mergekit_ray.methods.compiled import sce  # noqa: PLC0415 - compilers load where they are needed

    out = chunk.scratch.like(chunk.base)
    sce.variance(out.numpy(), chunk.base.numpy(), tuple(x.numpy() for x in chunk.inputs))
    return out


def variances_by_torch(chunk: Chunk) -> torch.Tensor:
    """`variances` by torch's operations, the same ones in the same order."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    assert chunk.base is not None
    first, e, totals, squares = (chunk.scratch.like(chunk.base) for _ in range(4))
    torch.sub(chunk.inputs[0], chunk.base, out=first)
    totals.zero_()
    squares.zero_()
    for x in chunk.inputs[1:]:
        torch.sub(x, chunk.base, out=e).sub_(first)
        totals.add_(e)
        squares.add_(e.mul_(e))
    return squares.sub_(divide_(totals.mul_(totals), len(chunk.inputs)))


def _selected(chunk: Chunk, selection: Selection | None) -> torch.Tensor:
    """1 where an element is selected, 0 elsewhere: uint8."""
    import torch  # noqa: PLC0415

    kept = chunk.scratch.like(chunk.inputs[0], torch.uint8)
    if selection is None:
        return kept.fill_(1)
    selection.flag_(variances(chunk), chunk.start, kept.view(torch.bool))
    return kept


def energies(chunk: Chunk, kept: torch.Tensor) -> list[torch.Tensor]:
    """Partial sums of ``δ_i²`` over what is kept, by model: float64."""
    import torch  # noqa: PLC0415

    assert chunk.base is not None
    if is_compiled_for(chunk.base):
        from mergekit_ray.methods.compiled import sce  # noqa: PLC0415 - compilers load where they are needed

        sums = sce.energies(chunk.base.numpy(), tuple(x.numpy() for x in chunk.inputs), kept.numpy())
        return [torch.from_numpy(sums[index : index + 1]) for index in range(len(sums))]
    return energies_by_torch(chunk, kept)


def energies_by_torch(chunk: Chunk, kept: torch.Tensor) -> list[torch.Tensor]:
    """`energies` by torch's operations; overwrites the models' runs."""
    import torch  # noqa: PLC0415

    wide = chunk.scratch.like(chunk.inputs[0], torch.float64)
    found = []
    for index in range(len(chunk.inputs)):
        wide.copy_(trim_(task_vector(chunk, index), kept))
        found.append(partial_sums(wide.mul_(wide), wide))
    return found


def fuse_(chunk: Chunk, kept: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The merged run, in place of the base."""
    assert chunk.base is not None
    if not is_compiled_for(chunk.base):
        return fuse_by_torch_(chunk, kept, weights)
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    from mergekit_ray.methods.compiled import sce  # noqa: PLC0415 - compilers load where they are needed

    run = chunk.base.numpy()
    inputs = tuple(x.numpy() for x in chunk.inputs)
    sce.fuse(run, inputs, kept.numpy(), np.array(weights, dtype=run.dtype), run.dtype.type(LEAST_DIVISOR))
    return chunk.base


def fuse_by_torch_(chunk: Chunk, kept: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """`fuse_` by torch's operations, the same ones in the same order."""
    base, deltas = task_vectors(chunk)
    signs, agrees, merged, divisor = (chunk.scratch.like(base).zero_() for _ in range(4))
    for delta in deltas:
        signs.add_(delta)
    signs.ge_(0).mul_(2).sub_(1)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(signs).relu_()
        divisor.add_(agrees.copy_(agreeing).gt_(0).mul_(weight))
        merged.add_(agreeing.mul_(weight))
    change = merged.div_(divisor.clamp_min_(LEAST_DIVISOR)).mul_(signs)
    return base.add_(change.masked_fill_(kept == 0, -0.0))  # which leaves any number as it is
