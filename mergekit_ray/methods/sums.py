"""Sums that do not depend on the number of threads, and as little as can be on the processor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NUM_FOLDS = 8
_MIN_FOLDED = 1 << 16
_RUN = 1 << 14
"""Elements summed by one thread: less than what torch splits over threads (32768, ``at::internal::GRAIN_SIZE``)."""


def partial_sums(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Float64 sums of consecutive runs of the 1-D ``x``: a few numbers, left on its device.

    Args:
        x: to be summed.
        wide: float64 scratch of the same length, or ``x`` itself if it is float64. By itself torch would make a fresh
            float64 copy each time, and the small results would then pin its pages.
    """
    import torch  # noqa: PLC0415 - declarations are read without torch

    if x is not wide:
        x = wide.copy_(x)
    whole = x.numel() // _RUN * _RUN
    parts = x[:whole].view(-1, _RUN).sum(dim=1, dtype=torch.float64)
    if whole == x.numel():
        return parts
    return torch.cat([parts, x[whole:].sum(dtype=torch.float64).view(1)])


def _wide(x: torch.Tensor) -> torch.Tensor:
    import torch  # noqa: PLC0415

    return x if x.dtype == torch.float64 else torch.empty_like(x, dtype=torch.float64)


def is_folded(x: torch.Tensor) -> bool:
    """Whether `folded_sums` folds runs like ``x``, rather than summing them in float64 throughout."""
    return x.itemsize >= 4 and x.numel() >= _MIN_FOLDED


def folded_sums(x: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """A few float64 partial sums of a 1-D run of float32 or wider. No faster than `partial_sums`.

    The run is folded upon itself eight times by additions element by element, which every processor rounds alike; the
    rest is summed in float64. The error is at most ``8 · 2^-24 · Σ|x|`` in float32; rounding errors are independent,
    so that of a long run is some ``10^-7 / sqrt(n / 256) · Σ|x|``. Short runs and 16-bit dtypes are left
    to `partial_sums`.

    Args:
        x: to be summed.
        spare: scratch like ``x``.
    """
    import torch  # noqa: PLC0415

    if not is_folded(x):
        return partial_sums(x, _wide(x))
    folded = x.numel() >> _NUM_FOLDS << _NUM_FOLDS
    half = folded // 2
    sums = torch.add(x[:half], x[half:folded], out=spare[:half])
    for _ in range(_NUM_FOLDS - 1):
        half //= 2
        sums = sums[:half].add_(sums[half:])
    summed = sums.sum(dtype=torch.float64).view(1)
    return summed if folded == x.numel() else torch.cat([summed, x[folded:].sum(dtype=torch.float64).view(1)])


def total(parts: Iterable[torch.Tensor]) -> float:
    """All partial sums, added without rounding but the last (`math.fsum`): their order does not matter."""
    import torch  # noqa: PLC0415

    collected = list(parts)
    return math.fsum(torch.cat(collected).tolist()) if collected else 0.0
