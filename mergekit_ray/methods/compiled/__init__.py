"""Loops compiled for the CPU: what would be many passes of torch over a run of elements, in one.

Imported by methods where they work, never by their declarations. Elsewhere (GPUs, 16-bit arithmetic) the same is done
by torch's operations; tests hold both to the same results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_compiled_for(x: torch.Tensor) -> bool:
    """Whether the loops take runs like ``x``: float32 or float64 on the CPU."""
    return x.device.type == "cpu" and x.is_floating_point() and x.itemsize >= 4  # bytes


def is_single_on_cpu(x: torch.Tensor) -> bool:
    """Whether a run is float32 on the CPU."""
    return is_compiled_for(x) and x.itemsize == 4  # bytes
