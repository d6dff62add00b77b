"""Runs of 16- and 32-bit numbers in memory, read and written a block at a time.

Numbers are given by address, so that any number of tensors, of either width, is one kind of argument: a run of each is
float32 (4 bytes wide) or bfloat16 (2 bytes), its upper half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from mergekit_ray.methods.compiled.intrinsics import float32_of, pointer_to, uint32_of
from mergekit_ray.methods.compiled.jit import compiled

Addresses = np.ndarray[Any, np.dtype[np.int64]]
Widths = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]

Place = tuple[int, int]
"""The address of the first element of a run, and the bytes of an element."""

_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
LARGEST_ROUNDED = np.uint32(0x7F7F7FFF)
"""Above are NaN, infinity, and what is rounded to a bfloat16 infinity."""
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)

BLOCK = 1 << 9
"""Elements handled at a time: a few such runs stay in the nearest cache of a core. A multiple of `LANES`."""


@compiled
def all_finite_floats(x: Floats) -> bool:
    """Whether no number is a NaN or an infinity."""
    largest = np.uint32(0)
    for i in range(x.size):
        largest = max(largest, np.uint32(uint32_of(x[i]) & _MAGNITUDE))
    return bool(largest < _EXPONENT)


@compiled
def read(address: int, width: int, out: Floats) -> None:
    """As float32."""
    if width == 2:
        bits = carray(pointer_to(address), out.size, np.uint16)
        for i in range(out.size):
            out[i] = float32_of(np.uint32(np.uint32(bits[i]) << _SIXTEEN))
    else:
        words = carray(pointer_to(address), out.size, np.uint32)
        for i in range(out.size):
            out[i] = float32_of(words[i])


@compiled
def read_change(address: int, width: int, base: Floats, out: Floats) -> None:
    """As float32, without the base."""
    if width == 2:
        bits = carray(pointer_to(address), out.size, np.uint16)
        for i in range(out.size):
            out[i] = float32_of(np.uint32(np.uint32(bits[i]) << _SIXTEEN)) - base[i]
    else:
        words = carray(pointer_to(address), out.size, np.uint32)
        for i in range(out.size):
            out[i] = float32_of(words[i]) - base[i]


@compiled
def store(total: Floats, address: int, width: int) -> bool:
    """Rounded to bfloat16, to nearest and to even, or as it is; whether it and the result are all finite."""
    largest = np.uint32(0)
    if width == 2:
        upper_halves = carray(pointer_to(address), total.size, np.uint16)
        for i in range(total.size):
            bits = uint32_of(total[i])
            largest = max(largest, np.uint32(bits & _MAGNITUDE))
            upper_halves[i] = np.uint32((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)
        return bool(largest <= LARGEST_ROUNDED)
    words = carray(pointer_to(address), total.size, np.uint32)
    for i in range(total.size):
        whole = uint32_of(total[i])
        largest = max(largest, np.uint32(whole & _MAGNITUDE))
        words[i] = whole
    return bool(largest < _EXPONENT)
