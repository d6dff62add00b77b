"""PCB-Merging: parameters compete within their model and with the same parameters of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.selection import Selection, select_largest
from mergekit_ray.methods.shared.sums import partial_sums, total
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, task_vectors

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]
"""Numbers of two models, the lower first; of one model with itself, twice the same."""


class PcbModelParameters(Parameters):
    """Per-model parameters of `Pcb`."""

    weight: float = Field(1.0, description="factor on the model's task vector in the sum", allow_inf_nan=False)
    density: float = Field(
        0.1, description="part of the task vector that is kept: that of the highest scores", ge=0, le=1
    )


_SMALL = 2.0**-66
"""Used where products of task vectors overflow: of float32 numbers times this, none does."""


@dataclass(frozen=True, slots=True)
class Competition:
    """Constants of the scores over the whole tensor.

    Attributes:
        highest: largest product of the pair's task vectors.
        range: largest less smallest product; 1 where that is nothing.
        intra: by model, factor of ``exp(N (Norm(δ_i²) − 1))``.
        inter: by pair, factor of ``exp(Norm(δ_i δ_j) − 1)``.
        scale: on the task vectors in products, a power of two that keeps them finite; scores are the same for any.
    """

    highest: dict[Pair, float]
    range: dict[Pair, float]
    intra: list[float]
    inter: dict[Pair, float]
    scale: float = 1.0


@METHODS.register("pcb")
class Pcb(ReduceMethod):
    """``b + λ Σ w_i β̂_i δ_i / Σ β̂_i``, ``β̂_i`` the ``⌈density·n⌉`` highest scores ``β_i`` of each model, 0 elsewhere.

    Du et al. 2024, "Parameter Competition Balancing for Model Merging". With N models and all softmaxes over the
    elements of the tensor:

    - intra-balancing ``softmax(N Norm(δ_i ⊙ δ_i))``: large changes count more;
    - inter-balancing ``Σ_j softmax(Norm(δ_i ⊙ δ_j))``: changes that others share count more;
    - ``β_i`` is their product.

    The paper scores a model's parameters all together; here each tensor by itself, as every method does. It leaves
    ``Norm`` open: here minimum and maximum become 0 and 1 (as in the authors' code, which otherwise puts other
    functions in place of the softmaxes), and a product that is the same everywhere is 1. The weights are the λ_i that
    the authors search for by evolution. Of equal scores at the threshold the lowest flat index is kept. An element that
    no model keeps stays the base's; models equal to the base leave it as it is; equal models of weight 1 give their
    kept elements in full.
    """

    name = "pcb"
    summary = "Score changes against others of the model and of other models, keep the best, average by score."
    formula = (
        "b + λ·Σ w_i·β̂_i·δ_i / Σ β̂_i, β̂_i the ⌈density·n⌉ largest of "
        "softmax(N·Norm(δ_i²))·Σ_j softmax(Norm(δ_i·δ_j)), Norm to [0, 1]"
    )
    reference = "https://arxiv.org/abs/2410.02396"
    base = BaseUse.REQUIRED
    model_parameters = PcbModelParameters
    global_parameters = ScaledParameters
    portable = False  # exponentials decide what is kept

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        return collected_bytes(math.prod(shape), num_models, itemsize)

    def statistics(self, operands: Operands) -> tuple[Competition, list[Selection]]:
        """The constants of the scores, and which scores are kept."""
        if operands.num_elements == 0:
            return Competition({}, {}, [], {}), []
        competition = _competition(operands)
        counts = [math.ceil(parameters.density * operands.num_elements) for parameters in operands.input_parameters]

        def ranked(chunk: Chunk, index: int) -> torch.Tensor:
            return _scores(chunk, _deltas_once(chunk), competition, index)

        return competition, select_largest(operands, counts, ranked)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` as `statistics` returns them."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        competition: Competition = statistics[0]
        selections: list[Selection] = statistics[1]
        base, deltas = task_vectors(chunk)
        merged, divisor = chunk.scratch.like(base).zero_(), chunk.scratch.like(base).zero_()
        for index, (selection, parameters) in enumerate(zip(selections, operands.input_parameters, strict=True)):
            score = selection.trim_(_scores(chunk, deltas, competition, index), chunk.start)
            divisor.add_(score)
            merged.add_(score.mul_(deltas[index]).mul_(parameters.weight))
        # Where nothing is kept, 0 is divided: by anything.
        merged.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny))
        return base.add_(merged.mul_(operands.parameters.lambda_))


def _deltas_once(chunk: Chunk) -> Sequence[torch.Tensor]:
    """The task vectors in place of the inputs, however often this is called for a chunk."""
    base, deltas = task_vectors(chunk)
    base.zero_()
    return deltas


def _competition(operands: Operands) -> Competition:
    import torch  # noqa: PLC0415

    num_inputs = operands.num_inputs
    pairs = [(i, j) for i in range(num_inputs) for j in range(i, num_inputs)]

    def extremes(scale: float) -> torch.Tensor:
        def ranges(chunk: Chunk) -> torch.Tensor:
            deltas = _deltas_once(chunk)
            spare = chunk.scratch.like(deltas[0])
            return torch.stack([torch.stack(torch.aminmax(_product(deltas, pair, scale, spare))) for pair in pairs])

        return torch.stack(operands.map_blocks(ranges))

    scale, found = 1.0, extremes(1.0)
    if not torch.isfinite(found).all():
        scale = _SMALL
        found = extremes(scale)
    lows, highs = found[..., 0].amin(dim=0).tolist(), found[..., 1].amax(dim=0).tolist()
    highest = dict(zip(pairs, highs, strict=True))
    spread = {pair: high - low if high > low else 1.0 for pair, low, high in zip(pairs, lows, highs, strict=True)}
    unit = Competition(highest, spread, [1.0] * num_inputs, dict.fromkeys(pairs, 1.0), scale)

    def exponentials(chunk: Chunk) -> list[torch.Tensor]:
        deltas = _deltas_once(chunk)
        spare = chunk.scratch.like(deltas[0])
        wide = chunk.scratch.like(deltas[0], torch.float64)
        inter = [partial_sums(_exponential(deltas, unit, pair, 1, spare), wide) for pair in pairs]
        intra = [partial_sums(_exponential(deltas, unit, (i, i), num_inputs, spare), wide) for i in range(num_inputs)]
        return inter + intra

    blocks = operands.map_blocks(exponentials)
    sums = [total([block[place] for block in blocks]) for place in range(len(pairs) + num_inputs)]
    # Softmaxes are taken times the number of elements over their largest possible value, which keeps scores within
    # (0, 1]: a factor common to all models and elements cancels.
    size = operands.num_elements
    inter = {pair: size / (math.e * num_inputs * part) for pair, part in zip(pairs, sums, strict=False)}
    intra = [size * math.exp(-num_inputs) / part for part in sums[len(pairs) :]]
    return Competition(highest, spread, intra, inter, scale)


def _product(deltas: Sequence[torch.Tensor], pair: Pair, scale: float, out: torch.Tensor) -> torch.Tensor:
    """``scale δ_i · scale δ_j``."""
    import torch  # noqa: PLC0415

    if scale == 1.0:
        return torch.mul(deltas[pair[0]], deltas[pair[1]], out=out)
    return torch.mul(deltas[pair[0]], scale, out=out).mul_(scale).mul_(deltas[pair[1]])


def _exponential(
    deltas: Sequence[torch.Tensor], competition: Competition, pair: Pair, factor: int, out: torch.Tensor
) -> torch.Tensor:
    """``exp(factor (Norm(δ_i δ_j) − 1))``."""
    product = _product(deltas, pair, competition.scale, out)
    norm = product.sub_(competition.highest[pair]).div_(competition.range[pair])
    return (norm if factor == 1 else norm.mul_(factor)).exp_()


def _scores(chunk: Chunk, deltas: Sequence[torch.Tensor], competition: Competition, index: int) -> torch.Tensor:
    """``β_i`` of model ``index``, up to a factor common to all models and elements, in scratch."""
    num_inputs = len(deltas)
    score, spare = chunk.scratch.like(deltas[0]).zero_(), chunk.scratch.like(deltas[0])
    for other in range(num_inputs):
        pair = (min(index, other), max(index, other))
        score.add_(_exponential(deltas, competition, pair, 1, spare).mul_(competition.inter[pair]))
    own = _exponential(deltas, competition, (index, index), num_inputs, spare)
    return score.mul_(own).mul_(competition.intra[index])
