"""Merge methods of papers in float64 numpy, written from the formulas: whole arrays, full SVDs, no shared code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.tensors import TensorSpec
from support.memory_inputs import DTYPES, Inputs, evaluate
from support.references.merge import Array, Expected, keep_largest

SMALL = 1e-10
"""Singular values below this part of the largest are zero."""


def as_float64(x: torch.Tensor) -> Array:
    return x.detach().to(torch.float64).numpy()


def evaluated(
    name: str,
    xs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    parameters: Mapping[str, Any] | None = None,
    input_parameters: Sequence[Mapping[str, Any]] | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    """A merge by the evaluator itself, for methods that see whole tensors; ``options`` are the evaluator's."""
    inputs = Inputs()
    expression = Merge(
        method=name,
        spec=TensorSpec("w", DTYPES[out_dtype or xs[0].dtype], tuple(xs[0].shape)),
        inputs=tuple(inputs.load(f"model {index}", x) for index, x in enumerate(xs)),
        base=None if base is None else inputs.load("base", base),
        parameters=dict(parameters or {}),
        input_parameters=tuple(dict(each) for each in input_parameters or [{}] * len(xs)),
        keys=tuple(str(index) for index in range(len(xs))),
        compute_dtype=DTYPES[compute_dtype],
    )
    return evaluate(expression, inputs, **options)


def random_models(
    shape: tuple[int, ...], num_models: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, size: float = 0.5
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Models that differ from a random base by Gaussian task vectors of standard deviation ``size``, and the base."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    xs = [(base + size * torch.randn(shape, generator=generator)).to(dtype) for _ in range(num_models)]
    return xs, base.to(dtype)


# ----------------------------------------------------------------------------------------------------------- consensus


def consensus(
    base: Array, deltas: Sequence[Array], merged: Array, lambdas: Sequence[float], *, k: int, scale: float
) -> Expected:
    """``b + λ [Σ 1[|δ_i| >= λ_i |δ_mtl − δ_i|] >= k] δ_mtl``."""
    votes = np.zeros(base.shape, dtype=int)
    is_stable = np.ones(base.shape, dtype=bool)
    for delta, factor in zip(deltas, lambdas, strict=True):
        own, other = np.abs(delta), factor * np.abs(merged - delta)
        votes += own >= other
        is_stable &= (np.abs(own - other) > 1e-5 * (own + other + np.abs(base))) | ((own == 0) & (merged == 0))
    change = np.where(votes >= k, merged, 0.0)
    magnitude = np.abs(base) + abs(scale) * sum(np.abs(delta) for delta in deltas)
    return Expected(base + scale * change, magnitude, is_stable | (merged == 0))


def ties_sum(
    deltas: Sequence[Array], ranked: Sequence[Array], weights: Sequence[float], densities: Sequence[float]
) -> tuple[Array, Array]:
    """The sum of what agrees with the elected sign, and where that does not hang on the last digits.

    ``ranked`` are magnitudes as the arithmetic sees them.
    """
    kept = [
        w * np.where(keep_largest(magnitudes, density), delta, 0.0)
        for w, delta, magnitudes, density in zip(weights, deltas, ranked, densities, strict=True)
    ]
    total, spread = np.asarray(sum(kept)), np.asarray(sum(np.abs(each) for each in kept))
    sign = np.where(total >= 0, 1.0, -1.0)
    agreeing = np.asarray(sum(np.where(np.sign(each) == sign, each, 0.0) for each in kept))
    return agreeing, (np.abs(total) > 1e-5 * spread) | (spread == 0)


# ------------------------------------------------------------------------------------------------------------ spectral


def polar(x: Array) -> Array:
    """``U Vᵀ`` of ``X = U Σ Vᵀ`` without the directions of zero singular values."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > SMALL * max(s.max(initial=0.0), 1e-300)
    return np.asarray(u[:, kept] @ vt[kept])


def leading(x: Array, rank: int, size: float = 1e-300) -> tuple[Array, Array, Array]:
    """``rank`` singular vectors and values; zeros for those that are zero against the largest, or against ``size``."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = np.where(s > SMALL * max(s.max(initial=0.0), size), s, 0.0)
    return (u * (s > 0))[:, :rank], s[:rank], (vt.T * (s > 0))[:, :rank]


def iso_c(deltas: Sequence[Array]) -> Array:
    total = np.asarray(sum(deltas))
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def iso_cts(deltas: Sequence[Array], fraction: float) -> Array:
    total = np.asarray(sum(deltas))
    rank, num_tasks = min(total.shape), len(deltas)
    own = min(round((rank - math.floor(rank * fraction)) / num_tasks), rank // num_tasks)
    u, s, v = leading(total, rank - own * num_tasks)
    parts = [leading(delta - u @ (u.T @ delta), own, float(np.linalg.norm(delta))) for delta in deltas]
    mean = np.concatenate([s, *(part[1] for part in parts)]).mean()
    left, right = (np.concatenate([first, *(part[i] for part in parts)], axis=1) for first, i in ((u, 0), (v, 2)))
    return np.asarray(mean * polar(left) @ polar(right).T)


def tsv_m(deltas: Sequence[Array]) -> Array:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [leading(delta, rank) for delta in deltas]
    left, values, right = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    return np.asarray(polar(left) * values @ polar(right).T)


# ---------------------------------------------------------------------------------------------------------------- pcb


def normalised(x: Array) -> Array:
    """To [0, 1] by minimum and maximum; 1 where all is the same."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.ones_like(x)


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max())
    return np.asarray(exponentials / exponentials.sum())


def pcb_scores(deltas: Sequence[Array]) -> list[Array]:
    flat = [delta.reshape(-1) for delta in deltas]
    return [
        softmax(len(flat) * normalised(own * own)) * sum(softmax(normalised(own * other)) for other in flat)
        for own in flat
    ]


def pcb(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], densities: Sequence[float], *, scale: float
) -> Expected:
    scores = pcb_scores(deltas)
    is_stable = np.ones(base.size, dtype=bool)
    kept = []
    for score, density in zip(scores, densities, strict=True):
        count = math.ceil(density * base.size)
        order = np.argsort(-score, kind="stable")
        mask = np.zeros(base.size, dtype=bool)
        mask[order[:count]] = True
        kept.append(np.where(mask, score, 0.0))
        if 0 < count < base.size:
            border = score[order[count - 1]]
            is_equal = np.ptp(score) <= 1e-12 * border  # then the order is that of the indices, in any arithmetic
            is_stable &= (np.abs(score - border) > 1e-5 * border) | is_equal
    divisor = sum(kept)
    top = sum(w * s * delta.reshape(-1) for w, s, delta in zip(weights, kept, deltas, strict=True))
    spread = sum(abs(w) * s * np.abs(delta.reshape(-1)) for w, s, delta in zip(weights, kept, deltas, strict=True))
    safe = np.where(divisor > 0, divisor, 1.0)
    value = base + scale * (top / safe).reshape(base.shape)
    return Expected(
        value, np.abs(base) + abs(scale) * (spread / safe).reshape(base.shape), is_stable.reshape(base.shape)
    )


# --------------------------------------------------------------------------------------------------------------- cabs


def cabs_owners(magnitudes: Sequence[Array], n: int, m: int) -> Array:
    """The number of the model that keeps each element, −1 for none, group after group in Python."""
    size = magnitudes[0].size
    owners = np.full(size, -1)
    for start in range(0, size, m):
        group = range(start, min(start + m, size))
        count = math.ceil(n * len(group) / m)
        for model, magnitude in enumerate(magnitudes):
            flat = magnitude.reshape(-1)
            free = [i for i in group if owners[i] < 0 and flat[i] > 0]
            for i in sorted(free, key=lambda i: (-flat[i], i))[:count]:
                owners[i] = model
    return owners.reshape(magnitudes[0].shape)


# --------------------------------------------------------------------------------------------------------------- wudi


def wudi_gradient(merged: Array, deltas: Sequence[Array]) -> Array:
    """Of ``Σ ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²``."""
    gradient = np.zeros_like(merged)
    for delta in deltas:
        if delta.any():
            gradient += 2 * (merged - delta) @ delta.T @ delta / np.sum(delta * delta)
    return gradient


def wudi_loss(merged: Array, deltas: Sequence[Array]) -> float:
    return float(
        sum(np.sum(((merged - delta) @ delta.T) ** 2) / np.sum(delta * delta) for delta in deltas if delta.any())
    )


def wudi(deltas: Sequence[Array], steps: int, rate: float) -> Array:
    """Adam as Kingma & Ba write it."""
    merged = np.array(sum(deltas))
    first, second = np.zeros_like(merged), np.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = wudi_gradient(merged, deltas)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        merged = merged - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return merged


# --------------------------------------------------------------------------------------------------- geometric median


def distance_sum(y: Array, xs: Sequence[Array], weights: Sequence[float]) -> float:
    return float(sum(w * np.linalg.norm((x - y).reshape(-1)) for w, x in zip(weights, xs, strict=True)))


def geometric_median(xs: Sequence[Array], weights: Sequence[float], iterations: int = 20000) -> Array:
    """Weiszfeld's iteration on the vectors themselves, from the mean; for medians that are none of the points."""
    flat = np.stack([x.reshape(-1) for x in xs])
    weight = np.asarray(weights) / sum(weights)
    y = weight @ flat
    for _ in range(iterations):
        rates = weight / np.linalg.norm(flat - y, axis=1)
        following = rates @ flat / rates.sum()
        if np.array_equal(following, y):
            break
        y = following
    return np.asarray(y.reshape(xs[0].shape))
