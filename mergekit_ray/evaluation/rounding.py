"""Rounding to a dtype: once, to nearest, ties to even; and whether what is rounded stays finite."""

from __future__ import annotations

import math

import torch

from mergekit_ray.evaluation.scratch import ThreadScratch


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite: one fast sum, which a NaN or infinity spoils; doubts are settled exactly."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    total = float(values.sum(dtype=wide))
    return math.isfinite(total) or bool(torch.isfinite(values).all())


def fits(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite, and stay so when rounded to ``dtype``."""
    limit = _overflow(values.dtype, dtype)
    if limit is None:
        return is_finite(values)
    low, high = torch.aminmax(values)
    return float(low) > -limit and float(high) < limit


def fits_there(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`fits`, or `is_finite` without a ``dtype``, as a 0-dimensional boolean left on the values' device.

    Nothing waits for the device.
    """
    limit = None if dtype is None else _overflow(values.dtype, dtype)
    if limit is None:
        return torch.isfinite(values).all()
    low, high = torch.aminmax(values)
    return (low > -limit).logical_and_(high < limit)


def _overflow(dtype: torch.dtype, target: torch.dtype) -> float | None:
    """The least magnitude that rounds from ``dtype`` to an infinity of ``target``; None if no number does."""
    largest = torch.finfo(target).max
    if largest >= torch.finfo(dtype).max:
        return None
    # Half way between the largest number and the power of two above it, values begin to be rounded to infinity.
    return float((largest + 2.0 ** math.frexp(largest)[1]) / 2)


def round_into(values: torch.Tensor, out: torch.Tensor, scratch: ThreadScratch) -> None:
    """Round ``values`` to the dtype of ``out``, once.

    torch takes float64 to 16 bits by way of float32, which rounds twice: 1 + 2^-8 + 2^-40 would become 1 in bfloat16.
    On that way the first step goes to the odd neighbour instead, which keeps on which side of a tie a value lies (Boldo
    and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if values.dtype != torch.float64 or out.dtype.itemsize != 2:
        out.copy_(values)
        return
    narrow = scratch.like(values, torch.float32)
    back = scratch.like(values)
    bits = narrow.view(torch.int32)
    narrow.copy_(values)
    back.copy_(narrow)
    inexact = back.ne(values)
    bits.sub_(back.abs_().gt(values.abs()).to(torch.int32))  # towards zero: sign and magnitude are apart in the bits
    bits.bitwise_or_(inexact.to(torch.int32))
    out.copy_(narrow)
