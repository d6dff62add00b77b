"""Tensors that are copied: their bytes stay as they are, and are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Stored
from mergekit_ray.evaluation.pieces import Bytes

_EXPONENTS: Final[dict[DType, np.unsignedinteger[Any]]] = {
    DType.F16: np.uint16(0x7C00),
    DType.BF16: np.uint16(0x7F80),
    DType.F32: np.uint32(0x7F800000),
    DType.F64: np.uint64(0x7FF0000000000000),
}
"""The bits of the exponent: all of them are set in a NaN or an infinity, and in nothing else (IEEE 754-2019, 3.4)."""

_RUN: Final = 1 << 16
"""Elements looked at at a time, in cache."""


def check_copy_finite(leaf: Stored, data: Bytes, start: int, references: Mapping[str, str] | None = None) -> None:
    """Refuse NaN and infinities in a tensor that is copied.

    Args:
        leaf: what was read.
        data: the bytes of a window of it.
        start: flat index of the window's first element.
        references: the models as the recipe names them, by key, for messages.

    Raises:
        MergeError: naming the model, the tensor and the first index.
    """
    exponent = _EXPONENTS.get(leaf.spec.dtype)
    if exponent is None:
        return
    numbers = data.view(exponent.dtype)
    scratch = np.empty(min(_RUN, numbers.size), exponent.dtype)
    for i in range(0, numbers.size, _RUN):
        run = numbers[i : i + _RUN]
        found = np.bitwise_and(run, exponent, out=scratch[: run.size]) == exponent
        if found.any():
            place = int(found.argmax())
            load, index = leaf.origin(start + i + place)
            raise MergeError(
                f"{_name(int(run[place]), int(exponent))} in the input, first at flat index {index}",
                where=f"model {(references or {}).get(load.model, load.model)}, tensor {load.spec.name!r}",
                remedy="use an undamaged checkpoint, or pass `options=MergeOptions(allow_non_finite=True)` "
                "to copy it as it is",
            )


def _name(bits: int, exponent: int) -> str:
    """What a number with a full exponent is: an infinity if nothing is set beside it and the sign."""
    lowest = exponent & -exponent
    if bits & (lowest - 1):
        return "nan"
    return "-inf" if bits & (exponent + lowest) & ~exponent else "inf"
