"""Element types by their safetensors names, without torch."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from mergekit_ray.core.spelling import nearest


class DType(enum.Enum):
    """An element type; the value is its name in a safetensors header.

    Source: safetensors format, https://github.com/huggingface/safetensors (README, "Format").
    """

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    U16 = "U16"
    I16 = "I16"
    U32 = "U32"
    I32 = "I32"
    U64 = "U64"
    I64 = "I64"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    F16 = "F16"
    BF16 = "BF16"
    F32 = "F32"
    F64 = "F64"

    def __repr__(self) -> str:
        return f"DType.{self.name}"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]

    @property
    def is_floating(self) -> bool:
        """Whether values of this type can be averaged: float16, bfloat16, float32 or float64 (not raw fp8 codes)."""
        return self in _MERGEABLE

    @property
    def config_name(self) -> str:
        """The name torch and ``config.json`` use, e.g. ``bfloat16``."""
        return _CONFIG_NAME[self]

    @classmethod
    def parse(cls, text: str) -> DType:
        """The floating dtype a recipe means: ``bfloat16``, ``bf16``, ``torch.bfloat16``, ``BF16``, ...

        Raises:
            ValueError: not a floating dtype; the message lists what is accepted and the nearest name.
        """
        found = _BY_NAME.get(text.strip().removeprefix("torch.").lower())
        if found is None or not found.is_floating:
            accepted = [dtype.config_name for dtype in cls if dtype.is_floating]
            raise ValueError(f"unknown dtype {text!r}; accepted: {', '.join(accepted)}{nearest(text, accepted)}")
        return found


_ITEMSIZE = {
    DType.BOOL: 1,
    DType.U8: 1,
    DType.I8: 1,
    DType.U16: 2,
    DType.I16: 2,
    DType.U32: 4,
    DType.I32: 4,
    DType.U64: 8,
    DType.I64: 8,
    DType.F8_E4M3: 1,
    DType.F8_E5M2: 1,
    DType.F16: 2,
    DType.BF16: 2,
    DType.F32: 4,
    DType.F64: 8,
}

_CONFIG_NAME = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.U16: "uint16",
    DType.I16: "int16",
    DType.U32: "uint32",
    DType.I32: "int32",
    DType.U64: "uint64",
    DType.I64: "int64",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E5M2: "float8_e5m2",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F32: "float32",
    DType.F64: "float64",
}

_MERGEABLE = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})

_BY_NAME = {name: dtype for dtype, name in _CONFIG_NAME.items()}
_BY_NAME |= {dtype.value.lower(): dtype for dtype in DType}
_BY_NAME |= {
    "half": DType.F16,
    "fp16": DType.F16,
    "float": DType.F32,
    "fp32": DType.F32,
    "double": DType.F64,
    "fp64": DType.F64,
}


def promote(dtypes: Iterable[DType]) -> DType:
    """The smallest floating dtype that holds every value of all of ``dtypes`` (bf16 with fp16 is fp32).

    Raises:
        ValueError: no dtypes, or one that is not floating.
    """
    distinct = set(dtypes)
    if not distinct or not all(dtype.is_floating for dtype in distinct):
        raise ValueError(f"cannot promote {sorted(dtype.value for dtype in distinct)}")
    if len(distinct) == 1:
        return distinct.pop()
    return DType.F64 if DType.F64 in distinct else DType.F32
