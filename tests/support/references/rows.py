"""Tensors whose rows are taken in another order, and what they are by numpy's reckoning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_ray.core.expressions import ZEROS, Runs


def mapping(seed: int, num_rows: Sequence[int], count: int, zeros: float = 0.1) -> list[tuple[int, int]]:
    """Rows as (part, row): runs and single ones, some more than once, some of zeros.

    Args:
        seed: of the choice.
        num_rows: of each part.
        count: of rows.
        zeros: how many of them are zeros, about.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        part = int(rng.integers(len(num_rows)))
        length = int(rng.choice([1, 1, 1, 2, 7, 40]))
        if rng.random() < zeros or not num_rows[part]:
            found += [(ZEROS, 0)] * min(length, 3)
        else:
            first = int(rng.integers(num_rows[part]))
            found += [(part, row) for row in range(first, min(first + length, num_rows[part]))]
    return found[:count]


def runs_of(rows: Sequence[tuple[int, int]]) -> Runs:
    return Runs.of((part, row, 1) for part, row in rows)


def taken(parts: Sequence[torch.Tensor], rows: Sequence[tuple[int, int]], shape: Sequence[int]) -> torch.Tensor:
    """The rows, one by one."""
    size = int(np.prod(shape)) // max(1, len(rows))
    flat = [part.reshape(-1, size) for part in parts]
    zeros = torch.zeros(size, dtype=parts[0].dtype)
    picked = [zeros if part == ZEROS else flat[part][row] for part, row in rows]
    return torch.stack(picked).reshape(*shape) if picked else torch.zeros(*shape, dtype=parts[0].dtype)
