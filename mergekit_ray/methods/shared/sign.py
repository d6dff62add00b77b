"""Sign election: contributions that disagree with the majority's sign are left out.

With weighted task vectors ``d_i``: ``s = sign(Σ d_i)``, zero counted as positive; ``m_i = [sign(d_i) = s]``; merged
``Σ m_i d_i``, over ``Σ m_i w_i`` if normalised (1 where that is 0). Yadav et al. 2023, https://arxiv.org/abs/2306.01708.

On the CPU that is one compiled pass. Elsewhere masks are kept as 0.0 and 1.0 in compute dtype: torch compares into a
tensor of the same dtype four times faster than into booleans, and multiplying by them needs no conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.accumulate import add_scaled_
from mergekit_ray.methods.shared.scratch import Scratch

if TYPE_CHECKING:
    import torch


def add_elected_(
    base: torch.Tensor,
    terms: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    factors: Sequence[float] | None = None,
    normalize: bool,
    scale: float,
    scratch: Scratch,
) -> torch.Tensor:
    """``base + scale · merged`` in place of ``base``.

    Args:
        base: 1-D run.
        terms: runs of the same length; overwritten.
        weights: ``w_i``, for the divisor.
        factors: ``d_i`` is ``factor_i · term_i``; None for the weights themselves.
        normalize: divide by the weights of the models that agree.
        scale: λ.
        scratch: for two more runs.
    """
    factors = weights if factors is None else factors
    if is_compiled_for(base):
        return _add_compiled(base, terms, factors, weights, scale, normalize=normalize)
    return add_elected_by_torch_(base, terms, weights, factors, normalize=normalize, scale=scale, scratch=scratch)


def _add_compiled(
    base: torch.Tensor,
    terms: Sequence[torch.Tensor],
    factors: Sequence[float],
    weights: Sequence[float],
    scale: float,
    *,
    normalize: bool,
) -> torch.Tensor:
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    from mergekit_ray.methods.compiled import election  # noqa: PLC0415 - compilers load where they are needed

    run = base.numpy()
    election.add_elected(
        run,
        tuple(term.numpy() for term in terms),
        np.array(factors, dtype=run.dtype),
        np.array(weights, dtype=run.dtype),
        run.dtype.type(scale),
        run.dtype.type(zero_divisor(weights, float(np.finfo(run.dtype).eps)) if normalize else math.inf),
    )
    return base


def add_elected_by_torch_(
    base: torch.Tensor,
    terms: Sequence[torch.Tensor],
    weights: Sequence[float],
    factors: Sequence[float],
    *,
    normalize: bool,
    scale: float,
    scratch: Scratch,
) -> torch.Tensor:
    """`add_elected_` by torch's operations, on any device and in any dtype; ``factors`` are given."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    weighted = [term.mul_(factor) for term, factor in zip(terms, factors, strict=True)]
    elected = _elected_sign(weighted, scratch)
    # Times the elected sign, what agrees is positive and what does not is cut off at zero.
    agreeing = [term.mul_(elected).relu_() for term in weighted]
    merged = agreeing[0]
    divisor = None
    if normalize:
        divisor = torch.gt(merged, 0, out=scratch.like(base)).mul_(weights[0])
    for place, term in enumerate(agreeing[1:], start=1):
        merged.add_(term)
        if divisor is not None:
            add_scaled_(divisor, term.gt_(0), weights[place])
    if divisor is not None:
        merged.div_(divisor.masked_fill_(divisor.abs() <= zero_divisor(weights, torch.finfo(base.dtype).eps), 1.0))
    return base.addcmul_(merged, elected, value=scale)


def _elected_sign(weighted: Sequence[torch.Tensor], scratch: Scratch) -> torch.Tensor:
    """+1 where the sum is zero or more, −1 elsewhere."""
    sign = scratch.like(weighted[0]).copy_(weighted[0])
    for term in weighted[1:]:
        sign.add_(term)
    return sign.ge_(0).mul_(2).sub_(1)


def zero_divisor(weights: Sequence[float], eps: float) -> float:
    """Up to this magnitude a sum of weights is a zero, in a dtype of that relative precision."""
    # Weights of both signs may cancel up to rounding.
    return 0.0 if min(weights) >= 0 else 2 * len(weights) * eps * sum(abs(weight) for weight in weights)
