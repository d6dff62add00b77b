"""Constants, values held by the plan, noise, and several tensors end to end.

Noise is drawn by counting, as random masks are: element ``i`` of the stream ``key`` is a function of the 32-bit word
``w`` that `hash_words` gives it. Uniform numbers are ``(2w + 1) / 2^32`` with ``w`` read as a signed number: odd
multiples of 2^-32 between -1 and 1. Normal ones are the quantile of the standard normal at ``(that + 1) / 2`` (M. J.
Wichura 1988, "Algorithm AS 241: The Percentage Points of the Normal Distribution", PPND16: to about 1 part in 10^16),
which reach ±6.34 standard deviations. Everything is done in float64 by additions, multiplications, divisions and square
roots, the logarithm too: these are rounded alike on every processor, so the noise is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mergekit_ray.core.expressions import Concat, Constant, Expression, Literal, Noise, loads
from mergekit_ray.methods.random_mask import hash_words
from mergekit_ray.runtime.nodes.base import Compilation, Guard, Node, NonFiniteError, node_of, round_result
from mergekit_ray.runtime.scratch import TORCH_DTYPES

_RUN_ELEMENTS = 1 << 15
"""Numbers drawn at a time on the CPU: the float64 intermediates of that many stay in cache."""

# PPND16: numerators and denominators, highest power first; the central region, and the tails beyond 0.425.
_CENTRE = 0.425
_CENTRE_ABOVE = (
    2509.0809287301226727,
    33430.575583588128105,
    67265.770927008700853,
    45921.953931549871457,
    13731.693765509461125,
    1971.5909503065514427,
    133.14166789178437745,
    3.3871328727963666080,
)
_CENTRE_BELOW = (
    5226.4952788528545610,
    28729.085735721942674,
    39307.895800092710610,
    21213.794301586595867,
    5394.1960214247511077,
    687.18700749205790830,
    42.313330701600911252,
    1.0,
)
_TAIL_ABOVE = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258,
    3.64784832476320460504,
    5.76949722146069140550,
    4.63033784615654529590,
    1.42343711074968357734,
)
_TAIL_BELOW = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940,
    2.05319162663775882187,
    1.0,
)
_LOG_SERIES = tuple(2.0 / (2 * k + 1) for k in range(11, -1, -1))
"""2 artanh(s) / s in powers of s²: beyond float64's precision for \\|s\\| <= 0.172."""


def uniform_numbers(key: str, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers uniform in (-1, 1): elements ``[start, start + count)`` of the stream ``key``, in float64."""
    words = torch.empty(count, dtype=torch.int32, device=device)
    hash_words(key, start, words, torch.empty_like(words))
    return words.to(torch.float64).mul_(2.0).add_(1.0).mul_(2.0**-32)


def normal_numbers(key: str, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers: elements ``[start, start + count)`` of the stream ``key``, in float64."""
    q = uniform_numbers(key, start, count, device).mul_(0.5)
    r = torch.neg(q.square()).add_(_CENTRE**2)
    result = _polynomial(_CENTRE_ABOVE, r).mul_(q).div_(_polynomial(_CENTRE_BELOW, r))
    is_tail = q.abs() > _CENTRE
    if q.device.type != "cpu":
        # To ask how many there are would be to wait for the device: all are calculated.
        return torch.where(is_tail, _tails(q), result)
    tails = torch.nonzero(is_tail).reshape(-1)
    if len(tails):
        result[tails] = _tails(q[tails])
    return result


def _tails(q: torch.Tensor) -> torch.Tensor:
    """The quantiles of ``q + 1/2`` that lie beyond the central region."""
    r = _log(torch.neg(q.abs()).add_(0.5)).neg_().sqrt_().sub_(1.6)
    return torch.copysign(_polynomial(_TAIL_ABOVE, r).div_(_polynomial(_TAIL_BELOW, r)), q)


def _polynomial(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Horner's rule in single steps: a fused multiply-add would round otherwise."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result.mul_(x).add_(coefficient)
    return result


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal float64 numbers, by exactly rounded operations only."""
    bits = x.view(torch.int64)
    exponent = bits.bitwise_right_shift(52).sub_(1023)
    mantissa = bits.bitwise_and((1 << 52) - 1).bitwise_or_(1023 << 52).view(torch.float64)  # in [1, 2)
    large = mantissa > math.sqrt(2.0)
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent.add_(large)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    series = _polynomial(_LOG_SERIES, s.square()).mul_(s)
    return series.add_(exponent.to(torch.float64).mul_(math.log(2.0)))


_DRAW: dict[str, Callable[[str, int, int, torch.device], torch.Tensor]] = {
    "normal": normal_numbers,
    "uniform": uniform_numbers,
}


@node_of(Noise)
class NoiseNode:
    """Adds random numbers in compute dtype, rounds once."""

    def __init__(self, noise: Noise, compilation: Compilation, guard: Guard) -> None:
        self.spec = noise.spec
        self._x = compilation.compile(noise.x)
        self._draw = _DRAW[noise.distribution]
        self._scale = noise.scale
        self._key = noise.key
        self._compute_dtype = TORCH_DTYPES[noise.compute_dtype]
        self._pool = compilation.pool
        self._guard = guard

    def prepare(self) -> None:
        """Prepares what is below."""
        self._x.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        values = self._pool.scratch.like(out, self._compute_dtype)
        self._x.fill(start, stop, values)
        if self._scale:
            step = _RUN_ELEMENTS if values.device.type == "cpu" else stop - start
            for first in range(start, stop, step):
                last = min(first + step, stop)
                drawn = self._draw(self._key, first, last - first, values.device).mul_(self._scale)
                values[first - start : last - start].add_(drawn.to(self._compute_dtype))
        round_result(values, self.spec.dtype, out, self._pool.scratch, self._guard)


@node_of(Constant)
class ConstantNode:
    """Fills with one value."""

    def __init__(self, constant: Constant, compilation: Compilation, guard: Guard) -> None:
        del compilation
        self.spec = constant.spec
        # Rounded to the tensor's dtype first: the caller may work in a wider one.
        self._value = torch.tensor(constant.value, dtype=torch.float64).to(TORCH_DTYPES[constant.spec.dtype])
        self._guard = guard

    def prepare(self) -> None:
        """Nothing."""

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        del start, stop
        if self._guard.result and not bool(torch.isfinite(self._value)):
            raise NonFiniteError
        out.fill_(self._value.item())


@node_of(Literal)
class LiteralNode:
    """Rounds the values that the plan holds."""

    def __init__(self, literal: Literal, compilation: Compilation, guard: Guard) -> None:
        self.spec = literal.spec
        data = bytearray(literal.data)
        self._pool = compilation.pool
        values = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
        self._values = values.to(self._pool.device)
        self._guard = guard

    def prepare(self) -> None:
        """Nothing: the values are there."""

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        values = self._pool.scratch.like(out, torch.float32).copy_(self._values[start:stop])
        round_result(values, self.spec.dtype, out, self._pool.scratch, self._guard)


@node_of(Concat)
class ConcatNode:
    """Fills each stretch of a run from the part it belongs to."""

    def __init__(self, concat: Concat, compilation: Compilation, guard: Guard) -> None:
        self.spec = concat.spec
        self._concat = concat
        # A window has the inputs of the parts it touches, and no others.
        self._parts: dict[int, Node] = {
            index: compilation.compile(part)
            for index, part in enumerate(concat.parts)
            if _has_inputs(part, compilation)
        }
        self._guard = guard

    def prepare(self) -> None:
        """Prepares the parts of this window."""
        for part in self._parts.values():
            part.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        for index, first, last, place in self._concat.overlaps(start, stop):
            self._parts[index].fill(first, last, out[place : place + last - first])
        if self._guard.result:
            self._guard.check(out)


def _has_inputs(part: Expression, compilation: Compilation) -> bool:
    return all(load in compilation.pieces for load in loads(part))
