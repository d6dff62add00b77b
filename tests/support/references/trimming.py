"""Breadcrumbs, DELLA, SCE and RAM in float64 numpy, written plainly: no shared code with the package.

Task vectors come in the arithmetic's own dtype (float32), because ranks, thresholds and variances are decided there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from support.references.merge import Array, Expected, hash_word


def descending(magnitudes: Array) -> Array:
    """Flat indices by falling magnitude; of equal ones the lowest first."""
    return np.argsort(-magnitudes.reshape(-1), kind="stable")


def keep_next_largest(magnitudes: Array, density: float, gamma: float) -> Array:
    """Mask of Breadcrumbs: without the largest and the smallest."""
    size = magnitudes.size
    count = math.floor(density * size)
    dropped = min(math.floor(gamma * size), size - count)
    mask = np.zeros(size, dtype=bool)
    mask[descending(magnitudes)[dropped : dropped + count]] = True
    return mask.reshape(magnitudes.shape)


def ranks(row: Array) -> Array:
    """0 for the smallest magnitude; of equal ones the lowest index has the highest rank."""
    found = np.empty(row.size, dtype=np.int64)
    found[descending(row)] = np.arange(row.size - 1, -1, -1)
    return found


def keep_probabilities(magnitudes: Array, density: float, epsilon: float) -> Array:
    """Probability of each element: by its rank in its row."""
    rows = magnitudes.reshape(-1, magnitudes.shape[-1]) if magnitudes.ndim else magnitudes.reshape(1, 1)
    length = rows.shape[1]
    if length == 1:
        return np.full(magnitudes.shape, density)
    by_rank = (density - epsilon) + 2 * epsilon / (length - 1) * np.arange(length)
    return np.array([by_rank[ranks(row)] for row in rows]).reshape(magnitudes.shape)


def words(key: str, size: int) -> Array:
    """The random words of the first elements, turned over as masks compare them."""
    return np.array([(hash_word(key, index) + 2**31) % 2**32 for index in range(size)], dtype=np.float64)


def keep_sampled(key: str, magnitudes: Array, density: float, epsilon: float) -> Array:
    """Mask of DELLA."""
    if density >= 1 or density <= 0:
        return np.full(magnitudes.shape, density >= 1)
    if not magnitudes.size:
        return np.zeros(magnitudes.shape, dtype=bool)
    limits = np.floor(keep_probabilities(magnitudes, density, epsilon) * 2.0**32)
    return words(key, magnitudes.size).reshape(magnitudes.shape) < limits


def select(deltas: Sequence[Array], topk: float) -> Array:
    """Mask of SCE: of the positions where task vectors vary, those where they do most."""
    stacked = np.array(deltas, dtype=np.float64)
    if topk >= 1:
        return np.ones(stacked.shape[1:], dtype=bool)
    variance = np.where((stacked == stacked[0]).all(axis=0), 0.0, stacked.var(axis=0))
    count = math.floor(topk * np.count_nonzero(variance))
    mask = np.zeros(variance.size, dtype=bool)
    mask[descending(variance)[:count]] = True
    return mask.reshape(variance.shape)


def sce(base: Array, deltas: Sequence[Array], topk: float) -> Expected:
    masked = [np.where(select(deltas, topk), d, 0.0).astype(np.float64) for d in deltas]
    energies = [math.fsum((d * d).reshape(-1)) for d in masked]
    total_energy = math.fsum(energies)
    weights = [energy / total_energy if total_energy else 0.0 for energy in energies]
    total = sum(masked)
    spread = sum(abs(d) for d in masked)
    sign = np.where(total >= 0, 1.0, -1.0)
    agreeing = [np.sign(d) == sign for d in masked]
    merged = sum(np.where(m, w * d, 0.0) for m, w, d in zip(agreeing, weights, masked, strict=True))
    divisor = np.maximum(sum(np.where(m, w, 0.0) for m, w in zip(agreeing, weights, strict=True)), 1e-6)
    is_stable = (np.abs(total) > 1e-5 * spread) | (spread == 0)
    return Expected(base + merged / divisor, abs(base) + spread, is_stable)


def ram(base: Array, deltas: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Expected:
    """RAM; with ``r`` and ``alpha`` RAM+ of one tensor."""
    changed = [abs(d) > np.float32(epsilon) for d in deltas]
    number = sum((c.astype(np.int64) for c in changed), np.zeros(base.shape, dtype=np.int64))
    mean = np.zeros(base.shape)
    alone = np.zeros(base.shape)
    for d, c in zip(deltas, changed, strict=True):
        num_alone, num_shared = np.count_nonzero(c & (number == 1)), np.count_nonzero(c & (number >= 2))
        ratio = num_shared / num_alone if num_alone else 0.0
        mean += np.where(c, d.astype(np.float64), 0.0) / np.maximum(number, 1)
        alone += np.where(c & (number == 1), d.astype(np.float64) * (1 + r * min(max(ratio, 0.0), alpha)), 0.0)
    spread = sum(abs(d.astype(np.float64)) for d in deltas)
    value = np.where(number == 0, base, base + np.where(number == 1, alone, mean))
    return Expected(value, abs(base) + spread * (1 + abs(r) * alpha), np.ones(base.shape, dtype=bool))
