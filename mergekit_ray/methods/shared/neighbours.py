"""The nearest rows of a matrix, and how to weigh them."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from mergekit_ray.methods.compiled.pursuit import Integers, products
from mergekit_ray.methods.compiled.runs import Doubles
from mergekit_ray.methods.shared.pursuit import Combinations, Screen
from mergekit_ray.methods.shared.stored_rows import Rows

_SHARE: Final = 2.0**-22
"""Of a score, what is lost in float32 beside the product's error."""


def interpolation(
    points: Rows, squares: Doubles, targets: torch.Tensor, k: int, *, is_cosine: bool, scheme: str
) -> Combinations:
    """Weights of each target's nearest points.

    Neighbours are looked for in float32 and sorted in float64, so that the same ones are found in any batch.

    Args:
        points: ``[n, e]``.
        squares: their squared norms; if one is not finite, nothing is interpolated.
        targets: ``[m, e]``, float32 and contiguous.
        k: neighbours.
        is_cosine: the nearest have the largest cosine, rather than the smallest distance.
        scheme: ``distance_proportional``, ``barycentric`` or ``least_squares``.
    """
    x = targets.numpy()
    m, k = x.shape[0], min(k, points.num_rows)
    is_finite = np.isfinite(x).all(axis=1) & bool(np.isfinite(squares).all())
    picked, coefficients = np.zeros((m, k), np.int64), np.zeros((m, k))
    sizes = np.where(is_finite, k, 0)
    if not is_finite.any() or k == 0:
        return Combinations(picked, coefficients, sizes, is_finite)
    own = (targets.double() ** 2).sum(dim=1).numpy()
    found = targets @ points.data.float().t()
    norms = np.sqrt(squares)
    error = Screen.of(points, torch.float32).error
    for i in np.flatnonzero(is_finite):
        rough = found[i].numpy().astype(np.float64)
        if is_cosine:
            rough = np.divide(rough, norms, out=np.zeros_like(rough), where=norms > 0)
            slack = 2 * error * np.sqrt(own[i])
        else:
            rough = 2 * rough - squares
            slack = 4 * error * np.sqrt(own[i]) * norms.max()
        least = np.partition(rough, rough.size - k)[rough.size - k]
        near = np.flatnonzero(rough >= least - slack - _SHARE * abs(least))
        exact = np.empty(near.size)
        products(points.place, near, x[i], exact)
        nearness = _nearness(exact, norms[near], squares[near], own[i], is_cosine=is_cosine)
        order = np.lexsort((near, -nearness))[:k]
        picked[i] = near[order]
        if scheme == "distance_proportional":
            coefficients[i] = _proportional(nearness[order], is_cosine=is_cosine)
        else:
            coefficients[i] = _solved(points, picked[i], targets[i], adds_to_one=scheme == "barycentric")
    return Combinations(picked, coefficients, sizes, is_finite)


def _nearness(exact: Doubles, norms: Doubles, squares: Doubles, own: float, *, is_cosine: bool) -> Doubles:
    """Cosines, or negative distances."""
    if not is_cosine:
        return np.asarray(-np.sqrt(np.maximum(squares - 2 * exact + own, 0.0)))
    both = norms * np.sqrt(own)
    return np.asarray(np.divide(exact, both, out=np.zeros_like(exact), where=both > 0))


def _proportional(nearness: Doubles, *, is_cosine: bool) -> Doubles:
    if is_cosine:
        weights = np.maximum(nearness, 0.0)
    elif nearness[0] == 0:
        weights = (nearness == 0).astype(np.float64)
    else:
        weights = -1.0 / nearness
    if not weights.any():
        weights = np.ones_like(weights)
    return np.asarray(weights / weights.sum())


def _solved(points: Rows, picked: Integers, target: torch.Tensor, *, adds_to_one: bool) -> Doubles:
    """The weights of least squares; the smallest of them where several sets serve alike.

    Those that are to add up to one are the nearest point's 1, and what is moved from it to the others.
    """
    near, x = points.data[torch.from_numpy(picked)].double(), target.double()
    if not adds_to_one:
        return _least_squares(near, x)
    moved = _least_squares(near[1:] - near[0], x - near[0])
    return np.concatenate([[1.0 - moved.sum()], moved])


def _least_squares(rows: torch.Tensor, x: torch.Tensor) -> Doubles:
    if not rows.shape[0]:
        return np.zeros(0)
    solution = torch.linalg.lstsq(rows.t(), x[:, None], driver="gelsd").solution
    return np.asarray(solution[:, 0].numpy(), np.float64)
