"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.compiled import is_single_on_cpu
from mergekit_ray.methods.shared.accumulate import weighted_sum_
from mergekit_ray.methods.shared.combinations import Interpolation, Sum
from mergekit_ray.methods.shared.gram import dots
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod
from mergekit_ray.methods.shared.sums import partial_sums, total

if TYPE_CHECKING:
    import torch

COLINEAR_COSINE = 0.9995
"""Above this ``|cos θ|`` the arc is as good as its chord, and ``1/sin θ`` loses digits."""

ZERO_NORM = 1e-8
"""A vector this short has no meaningful direction and is not divided by its norm."""


class SlerpParameters(Parameters):
    """Global parameters of `Slerp`."""

    t: float = Field(description="place on the arc: 0 is the base model, 1 the other", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Arc:
    """How far two vectors are apart.

    Attributes:
        cosine: of the angle between them, 0 where one of them is zero.
        is_colinear: whether they are interpolated along the chord.
    """

    cosine: float
    is_colinear: bool


@METHODS.register("slerp")
class Slerp(SumMethod, ReduceMethod):
    """Interpolation along the arc between the base and one other model (Shoemake 1985), each tensor as one flat vector.

    Norms and the dot product are sums in float64 of products in compute dtype: the two factors are exact to well below
    its rounding.
    """

    name = "slerp"
    summary = "Spherical interpolation between the base model and one other."
    formula = "sin((1-t)θ)/sinθ·b + sin(tθ)/sinθ·x, θ the angle between b and x; (1-t)·b + t·x if |cosθ| > 0.9995"
    reference = "https://doi.org/10.1145/325165.325242"
    base = BaseUse.REQUIRED
    base_is_input = True
    max_models = 1
    global_parameters = SlerpParameters
    propagates_non_finite = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum | Interpolation:
        """See `SumMethod.sum_of`."""
        t = float(tensor.parameters.t)
        base_square, dot, square = tensor.inner_products()
        arc = arc_between(base_square, square, dot)
        return Interpolation(t) if arc.is_colinear else Sum(arc_factors(arc, t))

    def statistics(self, operands: Operands) -> Arc:
        """The angle between base and model over the whole tensor."""
        squares = _summed(operands, exact=False)
        if not all(map(math.isfinite, squares)):
            squares = _summed(operands, exact=True)  # products beyond float32
        return arc_between(*squares)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is the `Arc`."""
        arc: Arc = statistics
        assert chunk.base is not None  # held by the declaration: base REQUIRED
        (x,) = chunk.inputs
        t = float(operands.parameters.t)
        if arc.is_colinear:
            return chunk.base.lerp_(x, t)
        return weighted_sum_([chunk.base, x], arc_factors(arc, t))


def arc_between(base_square: float, square: float, dot: float) -> Arc:
    """From ``b·b``, ``x·x`` and ``b·x``."""
    base_norm, norm = math.sqrt(base_square), math.sqrt(square)
    cosine = dot / (base_norm if base_norm > ZERO_NORM else 1.0) / (norm if norm > ZERO_NORM else 1.0)
    return Arc(cosine, abs(cosine) > COLINEAR_COSINE)


def arc_factors(arc: Arc, t: float) -> list[float]:
    """Of base and model, where they are not colinear; NaN where the angle is."""
    if math.isnan(arc.cosine):
        return [math.nan, math.nan]
    theta = math.acos(arc.cosine)
    sine = math.sin(theta)
    return [math.sin((1.0 - t) * theta) / sine, math.sin(t * theta) / sine]


def _summed(operands: Operands, *, exact: bool) -> tuple[float, float, float]:
    """``b·b``, ``x·x`` and ``b·x`` over the whole tensor."""
    blocks = operands.map_blocks(lambda chunk: _products(chunk, exact=exact))
    return total(b[0] for b in blocks), total(b[1] for b in blocks), total(b[2] for b in blocks)


def _products(chunk: Chunk, *, exact: bool) -> list[torch.Tensor]:
    """Partial sums of ``b·b``, ``x·x`` and ``b·x``; ``exact`` has the products themselves formed in float64."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    assert chunk.base is not None
    base, (x,) = chunk.base, chunk.inputs
    if is_single_on_cpu(base):
        base_square, dot, square = dots([base.numpy(), x.numpy()])
        return [torch.tensor(values, dtype=torch.float64) for values in (base_square, square, dot)]
    if exact or base.itemsize < 4:  # bytes: 16-bit products would lose what the sum is to keep
        base, x = (chunk.scratch.like(base, torch.float64).copy_(y) for y in (base, x))
    product, wide = chunk.scratch.like(base), chunk.scratch.like(base, torch.float64)
    sums = []
    for y, z in ((base, base), (x, x), (base, x)):
        torch.mul(y, z, out=product)
        sums.append(partial_sums(product, product if product.dtype == torch.float64 else wide))
    return sums
