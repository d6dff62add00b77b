"""Weighted sums: their coefficients (in Python's double precision) and their terms (in compute dtype)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.errors import MergeError
from mergekit_ray.methods.shared.scratch import Scratch

if TYPE_CHECKING:
    import torch

_CANCELLED = 1e-12
"""A sum of weights below this part of the sum of their magnitudes is rounding, not a number to divide by."""

_IN_ORDER = 4
"""Up to so many numbers torch adds one after the other; more in lanes."""


class NormalizedMethod(MethodDeclaration):
    """A method whose parameter ``normalize`` divides by the sum of the weights, which must not be zero then."""

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any], input_parameters: Sequence[Mapping[str, Any]]) -> None:
        """See `MethodDeclaration.check_together`."""
        coefficients([each["weight"] for each in input_parameters], normalize=parameters["normalize"])


def coefficients(
    weights: Sequence[float], *, normalize: bool, scale: float = 1.0, switch: str = "normalize"
) -> list[float]:
    """``scale * w_i``, over ``Σ w_i`` if ``normalize``, which the recipe calls ``switch``.

    Raises:
        MergeError: the weights are to be normalised and sum to zero.
    """
    if not normalize:
        return [scale * weight for weight in weights]
    total = math.fsum(weights)
    if abs(total) <= _CANCELLED * math.fsum(abs(weight) for weight in weights):
        raise MergeError(
            f"the weights {list(weights)} sum to 0 and cannot be normalised",
            remedy=f"set `{switch}: false`, or change the models' `weight`",
        )
    return [scale * weight / total for weight in weights]


def divisor(weights: Sequence[float], dtype: torch.dtype, *, normalize: bool) -> float:
    """The sum of the weights, added up in ``dtype``, if ``normalize``; else 1.

    Raises:
        MergeError: as `coefficients`.
    """
    return _sum_in(tuple(weights), dtype) if normalize else 1.0


def single_divisor(weights: Sequence[float]) -> float:
    """`divisor` in float32, for which torch is only imported where it adds up in an order of its own.

    Raises:
        MergeError: as `coefficients`.
    """
    if len(weights) > _IN_ORDER:
        import torch  # noqa: PLC0415

        return _sum_in(tuple(weights), torch.float32)
    import numpy as np  # noqa: PLC0415 - declarations are read without numpy, too

    coefficients(weights, normalize=True)
    return float(functools.reduce(operator.add, map(np.float32, weights)))


@functools.lru_cache(maxsize=1024)  # asked for with every chunk
def _sum_in(weights: tuple[float, ...], dtype: torch.dtype) -> float:
    import torch  # noqa: PLC0415 - declarations are read without torch

    coefficients(weights, normalize=True)
    return float(torch.tensor(weights, dtype=dtype).sum())


def add_scaled_(total: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    """``total += factor * x`` in place; ``x`` is scratch and may be overwritten.

    In 16-bit dtypes torch's fused form rounds the last elements of a run otherwise than the rest (vector and scalar
    code differ), which would make results depend on the chunk size; there the product is taken by itself.
    """
    if total.itemsize < 4:  # bytes
        total.add_(x.mul_(factor))
    else:
        total.add_(x, alpha=factor)


def divide_(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """``x / divisor`` in place, rounded once.

    Given a plain number, torch multiplies by its reciprocal on GPUs, which rounds twice: there a tensor is given.
    """
    if x.device.type == "cpu":
        return x.div_(divisor)
    import torch  # noqa: PLC0415 - declarations are read without torch

    if x.itemsize < 4:  # bytes: of which the divisor is not to be rounded to as few
        return x.copy_(divide_(x.to(torch.float32), divisor))
    return x.div_(x.new_full((), divisor))


def weighted_sum_(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """``Σ factor_i * term_i``, in order, into the first term; the others are scratch."""
    total = terms[0].mul_(factors[0])
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        add_scaled_(total, term, factor)
    return total


def rounded_sum_(
    terms: Sequence[torch.Tensor], weights: Sequence[float], *, divisor: float, scale: float, scratch: Scratch
) -> torch.Tensor:
    """``scale · Σ weight_i · term_i / divisor`` into the first term, every step rounded to the terms' dtype.

    Weights are rounded to that dtype, too; 16-bit products are added up in float32 and rounded once. That is how
    mergekit goes about it (observed from outside), whose bits ``compute_dtype: inputs`` is to give.
    """
    import torch  # noqa: PLC0415 - declarations are read without torch

    dtype = terms[0].dtype
    factors = torch.tensor(list(weights), dtype=dtype).tolist()
    total = terms[0].mul_(factors[0])
    if total.itemsize < 4:  # bytes
        total = scratch.like(total, torch.float32).copy_(total)
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        total.add_(term.mul_(factor))
    if total.dtype != dtype:
        total = terms[0].copy_(total)
    if divisor != 1.0:
        divide_(total, divisor)
    return total if scale == 1.0 else total.mul_(scale)
