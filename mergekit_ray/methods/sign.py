"""Sign election: contributions that disagree with the majority's sign are left out.

With weighted task vectors ``d_i``: ``s = sign(Σ d_i)``, zero counted as positive; ``m_i = [sign(d_i) = s]``; merged
``Σ m_i d_i``, over ``Σ m_i w_i`` if normalised (1 where that is 0). Yadav et al. 2023, https://arxiv.org/abs/2306.01708.

Masks are kept as 0.0 and 1.0 in compute dtype: torch compares into a tensor of the same dtype four times faster than
into booleans, and multiplying by them needs no conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_ray.methods.accumulate import add_scaled_
from mergekit_ray.methods.protocol import Scratch

if TYPE_CHECKING:
    import torch


def add_elected_(
    base: torch.Tensor,
    weighted: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
    scale: float,
    scratch: Scratch,
) -> torch.Tensor:
    """``base + scale · merged`` in place of ``base``.

    Args:
        base: 1-D run.
        weighted: ``d_i``, runs of the same length; overwritten.
        weights: ``w_i``, for the divisor.
        normalize: divide by the weights of the models that agree.
        scale: λ.
        scratch: for two more runs.
    """
    import torch  # noqa: PLC0415 - declarations are read without torch

    elected = _elected_sign(weighted, scratch)
    # Times the elected sign, what agrees is positive and what does not is cut off at zero.
    agreeing = [term.mul_(elected).relu_() for term in weighted]
    merged = agreeing[0]
    divisor = None
    if normalize:
        divisor = torch.gt(merged, 0, out=scratch.like(base)).mul_(weights[0])
    for term, weight in zip(agreeing[1:], weights[1:], strict=True):
        merged.add_(term)
        if divisor is not None:
            add_scaled_(divisor, term.gt_(0), weight)
    if divisor is not None:
        merged.div_(_without_zeros_(divisor, weights))
    return base.addcmul_(merged, elected, value=scale)


def _elected_sign(weighted: Sequence[torch.Tensor], scratch: Scratch) -> torch.Tensor:
    """+1 where the sum is zero or more, −1 elsewhere."""
    sign = scratch.like(weighted[0]).copy_(weighted[0])
    for term in weighted[1:]:
        sign.add_(term)
    return sign.ge_(0).mul_(2).sub_(1)


def _without_zeros_(divisor: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The divisor with 1 where it is zero, or with what serves as well."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    limits = torch.finfo(divisor.dtype)
    if min(weights) >= 0:
        # A sum of such weights is zero only where no model agrees, and there 0 is divided: by anything.
        smallest = min((weight for weight in weights if weight > 0), default=1.0)
        return divisor.clamp_min_(max(smallest / 2, limits.tiny))
    # Weights of both signs may cancel up to rounding; such a sum is a zero.
    rounding = 2 * len(weights) * limits.eps * sum(abs(weight) for weight in weights)
    return divisor.masked_fill_(divisor.abs() <= rounding, 1.0)
