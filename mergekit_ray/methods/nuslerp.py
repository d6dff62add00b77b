"""Spherical interpolation of two models by weights: whole tensors, or vector by vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.gram import inner_products, products, sum_of_vectors, vectors
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod
from mergekit_ray.methods.shared.rows import Lines

if TYPE_CHECKING:
    import torch

COLINEAR_SINE = 1e-4
"""Below this ``sin θ`` arc and chord differ by less than ``1.3e-9``, and ``1/sin θ`` magnifies rounding."""

SMALLEST_NORM = 1e-7
"""Shorter vectors are divided by this when their angle is taken: they count as orthogonal the shorter they are."""

_NO_WEIGHT = 1e-6
"""Weights with a sum below this are taken as equal."""


class NuslerpModelParameters(Parameters):
    """Per-model parameters of `Nuslerp`."""

    weight: float = Field(description="weight relative to the other model's", allow_inf_nan=False)


class NuslerpParameters(Parameters):
    """Global parameters of `Nuslerp`."""

    nuslerp_flatten: bool = Field(True, description="interpolate each tensor as one flat vector")
    nuslerp_row_wise: bool = Field(
        False, description="if not flattened: vectors along the first dimension instead of the last"
    )


@dataclass(frozen=True, slots=True)
class Factors:
    """What the two models, or their task vectors, are multiplied by.

    Attributes:
        shared: of the whole tensor, if it is one vector.
        by_line: of each vector in compute dtype, otherwise.
        lines: the vectors.
    """

    shared: tuple[float, float]
    by_line: tuple[torch.Tensor, torch.Tensor] | None
    lines: Lines


@METHODS.register("nuslerp")
class Nuslerp(SumMethod, ReduceMethod):
    """``sin((1−t)θ)/sinθ · x_1 + sin(tθ)/sinθ · x_2`` with ``t = w_2/(w_1 + w_2)``, ``θ`` the angle between the two.

    With a base, this of their task vectors, added to the base. ``t`` is 1/2 where the weights sum to less than 1e-6,
    and lies outside [0, 1] where they differ in sign. Vectors that are colinear, ``sin θ < 1e-4``, opposite ones among
    them, are interpolated along the chord, ``(1−t) x_1 + t x_2``. A vector of zero is orthogonal to any.

    Not flattened, the vectors are those along the last dimension (the rows of a matrix: one for each output of a linear
    layer), or with ``nuslerp_row_wise``, whose name is mergekit's, along the first dimension (the columns: one for each
    input). A 1-D tensor is one vector.
    """

    name = "nuslerp"
    summary = "Spherical interpolation of two models by weights, of whole tensors, rows or columns."
    formula = "sin((1-t)θ)/sinθ·x_1 + sin(tθ)/sinθ·x_2, t = w_2/(w_1+w_2); (1-t)·x_1 + t·x_2 if colinear"
    reference = "https://doi.org/10.1145/325165.325242"
    base = BaseUse.OPTIONAL
    min_models = 2
    max_models = 2
    model_parameters = NuslerpModelParameters
    global_parameters = NuslerpParameters
    propagates_non_finite = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum | None:
        """See `SumMethod.sum_of`."""
        settings = tensor.parameters
        if not _is_flat(settings, _lines(settings, tensor.shape), math.prod(tensor.shape)):
            return None
        t = _place(*[float(parameters.weight) for parameters in tensor.input_parameters])
        return Sum(flat_factors(tensor.inner_products(), t))

    def statistics(self, operands: Operands) -> Factors:
        """Factors of the tensor or of each vector in it."""
        settings = operands.parameters
        t = _place(*[float(parameters.weight) for parameters in operands.input_parameters])
        lines = _lines(settings, operands.shape)
        if _is_flat(settings, lines, operands.num_elements):
            return Factors(flat_factors(inner_products(operands), t), None, lines)
        first, second = arc_factors(lines.sums(operands, products, 3), t)
        dtype = operands.compute_dtype
        return Factors((0.0, 0.0), (first.to(dtype), second.to(dtype)), lines)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the `Factors`."""
        del operands
        factors: Factors = statistics
        if factors.by_line is None:
            return sum_of_vectors(chunk, factors.shared)
        first, second = (
            factors.lines.scale_(vector, chunk.start, factor)
            for vector, factor in zip(vectors(chunk), factors.by_line, strict=True)
        )
        merged = first.add_(second)
        return merged if chunk.base is None else chunk.base.add_(merged)


def _place(first: float, second: float) -> float:
    """``t``: the second model's part of the weight."""
    return second / (first + second) if abs(first + second) >= _NO_WEIGHT else 0.5


def _lines(settings: NuslerpParameters, shape: tuple[int, ...]) -> Lines:
    return (Lines.along_first if settings.nuslerp_row_wise else Lines.along_last)(shape)


def _is_flat(settings: NuslerpParameters, lines: Lines, num_elements: int) -> bool:
    """Whether the whole tensor is one vector."""
    return settings.nuslerp_flatten or lines.num_lines == 1 or not num_elements


def flat_factors(inner: Sequence[float], t: float) -> tuple[float, float]:
    """`arc_factors` of one pair of vectors, of plain numbers and so without torch; NaN where an inner product is."""
    if any(map(math.isnan, inner)):
        return math.nan, math.nan
    norms = [max(math.sqrt(inner[place]), SMALLEST_NORM) for place in (0, 2)]
    theta = math.acos(min(1.0, max(-1.0, inner[1] / norms[0] / norms[1])))
    sine = math.sin(theta)
    if sine < COLINEAR_SINE:
        return 1.0 - t, t
    return math.sin((1.0 - t) * theta) / sine, math.sin(t * theta) / sine


def arc_factors(inner: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of two vectors at ``t`` of the arc between them.

    Args:
        inner: float64 ``x_1·x_1``, ``x_1·x_2`` and ``x_2·x_2`` along the first dimension.
        t: 0 is the first vector, 1 the second.
    """
    import torch  # noqa: PLC0415

    norms = [inner[place].sqrt().clamp_min(SMALLEST_NORM) for place in (0, 2)]
    theta = (inner[1] / norms[0] / norms[1]).clamp(-1.0, 1.0).acos()
    sine = theta.sin()
    is_colinear = sine < COLINEAR_SINE
    divisor = torch.where(is_colinear, 1.0, sine)
    first = torch.where(is_colinear, 1.0 - t, ((1.0 - t) * theta).sin() / divisor)
    second = torch.where(is_colinear, t, (t * theta).sin() / divisor)
    return first, second
