"""Approximations of rows, run alone, and the same by formulas in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from mergekit_ray.evaluation.noise import normal_numbers
from mergekit_ray.methods.approximation.protocol import Approximation, Shared, approximation
from mergekit_ray.methods.shared.stored_rows import Rows

Array = np.ndarray[Any, np.dtype[np.float64]]


def method(name: str, key: str = "key", **parameters: Any) -> Approximation:
    """An approximation with its noise."""
    return approximation(name, parameters, partial(normal_numbers, key))


def approximate(
    name: str,
    model: torch.Tensor,
    donor: torch.Tensor | None = None,
    missing: torch.Tensor | None = None,
    *,
    rows: int | None = None,
    batch: int | None = None,
    key: str = "key",
    **parameters: Any,
) -> torch.Tensor:
    """Rows of missing tokens, ``batch`` at a time."""
    found = method(name, key, **parameters)
    fitted = found.fit(Shared(Rows.of(model), None if donor is None else Rows.of(donor)))
    count = missing.shape[0] if missing is not None else rows or 0
    out = torch.full((count, model.shape[1]), 7.0)
    for start in range(0, count, batch or max(1, count)):
        stop = min(start + (batch or count), count)
        found.approximate(
            fitted, None if missing is None else missing[start:stop].float().contiguous(), start, out[start:stop]
        )
    return out


def pursuit(x: Array, atoms: Array, k: int) -> tuple[list[int], Array]:
    """Orthogonal matching pursuit as its papers have it: which atoms, and their coefficients."""
    chosen: list[int] = []
    rest = x.copy()
    solution = np.zeros(0)
    for _ in range(k):
        products = np.abs(atoms @ rest)
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        solution = np.linalg.lstsq(atoms[chosen].T, x, rcond=None)[0]
        rest = x - atoms[chosen].T @ solution
    return chosen, solution
