"""Sums that do not depend on the number of threads, and as little as can be on the processor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def total(parts: Iterable[torch.Tensor]) -> float:
    """All partial sums, added without rounding but the last (`math.fsum`): their order does not matter."""
    import torch  # noqa: PLC0415

    collected = list(parts)
    return math.fsum(torch.cat(collected).tolist()) if collected else 0.0
