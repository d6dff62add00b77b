"""Constants, values held by the plan, noise, and several tensors end to end.

Noise is what `evaluation.noise` defines, which draws it on the CPU; here is the same for devices, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mergekit_ray.core.expressions import Concat, Constant, Literal, Noise
from mergekit_ray.evaluation import noise as on_cpu
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, NonFiniteError, node_of, round_result
from mergekit_ray.evaluation.noise import (
    CENTRE,
    CENTRE_ABOVE,
    CENTRE_BELOW,
    LOG_SERIES,
    RUN_ELEMENTS,
    TAIL_ABOVE,
    TAIL_BELOW,
)
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.random_mask import hash_words


def uniform_numbers(key: str, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers uniform in (-1, 1): elements ``[start, start + count)`` of the stream ``key``, in float64."""
    words = torch.empty(count, dtype=torch.int32, device=device)
    hash_words(key, start, words, torch.empty_like(words))
    return words.to(torch.float64).mul_(2.0).add_(1.0).mul_(2.0**-32)


def normal_numbers(key: str, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers: elements ``[start, start + count)`` of the stream ``key``, in float64."""
    q = uniform_numbers(key, start, count, device).mul_(0.5)
    r = torch.neg(q.square()).add_(CENTRE**2)
    result = _polynomial(CENTRE_ABOVE, r).mul_(q).div_(_polynomial(CENTRE_BELOW, r))
    # To ask how many are tails would be to wait for the device: all are calculated.
    return torch.where(q.abs() > CENTRE, _tails(q), result)


def _tails(q: torch.Tensor) -> torch.Tensor:
    """The quantiles of ``q + 1/2`` that lie beyond the central region."""
    r = _log(torch.neg(q.abs()).add_(0.5)).neg_().sqrt_().sub_(1.6)
    return torch.copysign(_polynomial(TAIL_ABOVE, r).div_(_polynomial(TAIL_BELOW, r)), q)


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
    series = _polynomial(LOG_SERIES, s.square()).mul_(s)
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
        self._distribution = noise.distribution
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
            step = RUN_ELEMENTS if values.device.type == "cpu" else stop - start
            for first in range(start, stop, step):
                last = min(first + step, stop)
                drawn = self._drawn(first, last - first, values.device).mul_(self._scale)
                values[first - start : last - start].add_(drawn.to(self._compute_dtype))
        round_result(values, self.spec.dtype, out, self._pool.scratch, self._guard)

    def _drawn(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":
            return torch.from_numpy(on_cpu.DRAW[self._distribution](self._key, start, count))
        return _DRAW[self._distribution](self._key, start, count, device)


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
            index: compilation.compile(part) for index, part in enumerate(concat.parts) if compilation.has_inputs(part)
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
