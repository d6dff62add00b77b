"""The geometric merge formulas in float64 numpy, on the vectors themselves: no Gram matrices, no blocks, full sorts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from support.references.merge import Array, Expected


def everywhere(value: Array, magnitude: Array) -> Expected:
    return Expected(value, magnitude, np.ones_like(value, dtype=bool))


def differences(xs: Sequence[Array], base: Array | None) -> list[Array]:
    return [x if base is None else x - base for x in xs]


def norm(x: Array) -> float:
    return math.sqrt(dot(x, x))


def dot(x: Array, y: Array) -> float:
    return float((x * y).sum(dtype=np.longdouble))


def arc(x: Array, y: Array, t: float) -> tuple[float, float]:
    """Factors of two vectors at ``t`` of the arc between them."""
    cosine = dot(x, y) / (max(norm(x), 1e-7) * max(norm(y), 1e-7))
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(theta) < 1e-4:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def nuslerp(xs: Sequence[Array], base: Array | None, weights: Sequence[float], axis: int | None) -> Expected:
    """Slerp of two vectors for each place on the other axes; ``axis`` None for flat tensors."""
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    first, second = differences(xs, base)
    factors = [np.ones_like(first), np.ones_like(first)]
    if axis is None or first.ndim == 0:
        for factor, value in zip(factors, arc(first, second, t), strict=True):
            factor[...] = value
    else:
        moved = [np.moveaxis(v, axis, -1) for v in (first, second, *factors)]
        for place in np.ndindex(moved[0].shape[:-1]):
            moved[2][place], moved[3][place] = arc(moved[0][place], moved[1][place], t)
    change = factors[0] * first + factors[1] * second
    offset = np.zeros_like(first) if base is None else base
    magnitude = abs(offset) + sum((abs(f) + 1) * abs(x) for f, x in zip(factors, (first, second), strict=True))
    return everywhere(offset + change, magnitude)


def multislerp(
    xs: Sequence[Array], base: Array | None, weights: Sequence[float], *, normalize: bool = True, eps: float = 1e-8
) -> Expected:
    """As published, with the tangents: normalised mean, mean of the logarithms' linear parts, exponential map."""
    vectors = differences(xs, base)
    offset = np.zeros_like(xs[0]) if base is None else base
    if len(xs) == 1:
        return everywhere(offset + vectors[0], abs(offset) + abs(vectors[0]))
    w = [weight / math.fsum(weights) for weight in weights] if normalize else list(weights)
    units = [v / (norm(v) + eps) if norm(v) else v for v in vectors]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    if norm(mean) <= max(eps, 1e-7 * sum(abs(a) * norm(u) for a, u in zip(w, units, strict=True))):
        linear = sum(a * v for a, v in zip(w, vectors, strict=True))
        return everywhere(offset + linear, abs(offset) + sum(abs(a * v) for a, v in zip(w, vectors, strict=True)))
    pole = mean / norm(mean)
    tangent = sum(a * (u - dot(u, pole) * pole) for a, u in zip(w, units, strict=True))
    angle = norm(tangent) + eps
    scale = sum(a * norm(v) for a, v in zip(w, vectors, strict=True))
    value = scale * (math.cos(angle) * pole + math.sin(angle) * tangent / angle)
    terms = sum(abs(a * u) for a, u in zip(w, units, strict=True)) * abs(scale) / norm(mean)
    return everywhere(offset + value, abs(offset) + terms)


def karcher(xs: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Expected:
    """Log and exp maps on the vectors themselves."""
    units = [x / norm(x) for x in xs if norm(x) > tol]
    size = math.fsum(norm(x) for x in xs) / len(xs)
    if not units:
        return everywhere(np.zeros_like(xs[0]), np.zeros_like(xs[0]))
    mean = sum(units) / len(units)
    pole = mean / norm(mean) if norm(mean) > 1e-7 else units[0]
    for _ in range(max_iter):
        logs = []
        for unit in units:
            cosine = max(-1.0, min(1.0, dot(unit, pole)))
            across = unit - cosine * pole
            sine = norm(across)
            logs.append(across * (math.atan2(sine, cosine) / sine) if sine > 1e-7 else np.zeros_like(unit))
        step = sum(logs) / len(units)
        angle = norm(step)
        if angle < tol or angle == 0:
            break
        pole = math.cos(angle) * pole + math.sin(angle) / angle * step
        pole = pole / norm(pole)
    # Coefficients of the models, to bound the rounding of their weighted sum.
    matrix = np.stack([x.reshape(-1) for x in xs], axis=1)
    coefficients = np.linalg.lstsq(matrix, size * pole.reshape(-1), rcond=1e-9)[0] if pole.size else np.zeros(len(xs))
    magnitude = sum(abs(c * x) for c, x in zip(coefficients, xs, strict=True)) + abs(size * pole)
    return everywhere(size * pole, magnitude)


def model_stock(xs: Sequence[Array], base: Array, *, filter_wise: bool = False) -> Expected:
    ratio = np.zeros_like(base)
    deltas = differences(xs, base)
    if filter_wise and base.ndim:
        for place in np.ndindex(base.shape[:-1]):
            ratio[place] = stock_ratio([delta[place] for delta in deltas])
    else:
        ratio[...] = stock_ratio(deltas)
    mean = sum(xs) / len(xs)
    magnitude = abs(base) + abs(ratio) * sum(abs(delta) for delta in deltas)
    return everywhere(ratio * mean + (1 - ratio) * base, magnitude)


def stock_ratio(deltas: Sequence[Array]) -> float:
    n = len(deltas)
    pairs = [(deltas[i], deltas[j]) for i in range(n) for j in range(i)]
    cosines = [dot(x, y) / (norm(x) * norm(y)) if norm(x) and norm(y) else 0.0 for x, y in pairs]
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1 + (n - 1) * cosine
    return n * cosine / divisor if divisor >= 1e-6 else 0.0


def nearswap(x: Array, base: Array, t: float) -> Expected:
    share = np.clip(t / np.maximum(abs(base - x), 1e-6), 0.0, 1.0)
    return everywhere(share * x + (1 - share) * base, abs(x) + abs(base))


def divergence(x: Array, base: Array) -> float:
    """KL of the softmax of one row from that of another, with digits to spare; what float64 cannot tell from 0 is 0."""
    p, q = (np.exp(v.astype(np.longdouble) - v.max()) for v in (x, base))
    p, q = p / p.sum() + 1e-8, q / q.sum() + 1e-8
    found = float((p * np.log1p((p - q) / q) - (p - q)).sum())
    return found if found >= 1e-28 else 0.0


def importance(x: Array, base: Array) -> Array:
    shape = (-1, x.shape[-1] if x.ndim else 1)
    rows = zip(x.reshape(shape), base.reshape(shape), strict=True)
    return np.array([abs(row - other) * divergence(row, other) for row, other in rows]).reshape(x.shape)


def arcee_fusion(x: Array, base: Array) -> Expected:
    """Stable where the importance is not within rounding of the threshold."""
    if not x.size:
        return everywhere(x, abs(x))
    found = importance(x, base)
    ascending = np.sort(found.reshape(-1))
    first, median, third = (ascending[math.floor(part * (len(ascending) - 1))] for part in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (third - first)
    # One element is its own threshold, exactly.
    is_stable = (abs(found - limit) > 1e-5 * limit) | (found.size == 1) | (limit == 0)
    return Expected(np.where(found >= limit, x, base), np.zeros_like(x), is_stable)
