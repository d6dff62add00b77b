"""Interpolation that swaps in what is near: the smaller the difference, the more of the other model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.combinations import Clamped
from mergekit_ray.methods.shared.protocol import Chunk, Operands, SummedTensor, SumMethod
from mergekit_ray.methods.shared.scratch import Scratch

if TYPE_CHECKING:
    import torch

SMALLEST_DIFFERENCE = 1e-6
"""Differences below this count as this much."""


class NearswapParameters(Parameters):
    """Global parameters of `Nearswap`."""

    t: float = Field(
        description="difference up to which an element is taken from the other model; beyond it t/|b - x| of it",
        ge=0.0,
        allow_inf_nan=False,
    )


@METHODS.register("nearswap")
class Nearswap(SumMethod):
    """``s·x + (1 − s)·b`` with ``s = min(t / max(|b − x|, 1e-6), 1)``, element by element.

    Since ``s (x − b)`` is ``x − b`` cut off at ``±t``, that is ``x`` held within ``b ± t``, which is how it is
    calculated: what is nearer than ``t`` is ``x``, bit for bit, and all else moves by ``t``. Below ``t = 1e-6`` small
    differences are scaled instead of cut off, and ``t = 0`` or ``x = b`` is the base, bit for bit.
    In bfloat16 arithmetic (``compute_dtype: inputs``) every step of the formula is rounded, as mergekit does it.
    """

    name = "nearswap"
    summary = "Take the other model where it is near the base; elsewhere move the base towards it by t."
    formula = "s·x + (1-s)·b, s = clip(t / max(|b - x|, 1e-6), 0, 1)"
    base = BaseUse.REQUIRED
    base_is_input = True
    max_models = 1
    global_parameters = NearswapParameters

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Clamped | None:
        """See `SumMethod.sum_of`."""
        t = float(tensor.parameters.t)
        return Clamped(t) if t >= SMALLEST_DIFFERENCE else None

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        del statistics
        assert chunk.base is not None  # held by the declaration: base REQUIRED
        base, (x,) = chunk.base, chunk.inputs
        t = float(operands.parameters.t)
        if base.dtype == torch.bfloat16:  # arithmetic in it is only done for mergekit's bits
            return _by_steps(base, x, t, chunk.scratch)
        if t < SMALLEST_DIFFERENCE:
            change = x.sub_(base).clamp_(-SMALLEST_DIFFERENCE, SMALLEST_DIFFERENCE)
            return base.add_(change.mul_(t / SMALLEST_DIFFERENCE))
        lowest = torch.sub(base, t, out=chunk.scratch.like(base))
        torch.maximum(x, lowest, out=x)
        return torch.minimum(x, base.add_(t), out=x)


def _by_steps(base: torch.Tensor, x: torch.Tensor, t: float, scratch: Scratch) -> torch.Tensor:
    """The formula as it is written, every step rounded; ``x`` and ``base`` are scratch."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    share = torch.sub(base, x, out=scratch.like(base)).abs_().clamp_(min=SMALLEST_DIFFERENCE)
    share.reciprocal_().mul_(t).clamp_(0.0, 1.0)
    x.mul_(share)
    return x.add_(base.mul_(share.neg_().add_(1.0)))
