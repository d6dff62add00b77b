"""How the weights of a checkpoint are stored when they are codes: which tensors belong together, and what they mean.

What is known is read off names, dtypes and shapes, and off the ``quantization_config`` where those leave a choice.
Where all weights are numbers, what it says of codes is left over from another copy of the model:

    <w>  F8_E4M3, F8_E5M2     <w>_scale_inv, <w>_scale     8-bit floats; a scale per block, row, column or tensor
    <w>_blocks  U8            <w>_scales  U8               MXFP4 in gpt-oss's layout

Both kinds of scale are multiplied with (``inv`` means that it undoes the quantisation). Everything else that is
quantised is refused by name: an average of codes means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mergekit_ray.architectures.anatomy import is_buffer
from mergekit_ray.architectures.quantisation_config import (
    DEFAULT_BLOCK,
    REMEDY,
    blocks_of,
    check_numbers,
    method_of,
    refusal,
    settings_of,
)
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions.quantised import FP8_NON_FINITE, MXFP4_GROUP_BYTES
from mergekit_ray.core.tensors import TensorSpec

_MAX_LISTED: Final = 12

_FP8 = frozenset(FP8_NON_FINITE)
_SCALE_DTYPES = frozenset({DType.F32, DType.BF16, DType.F16})
_SCALE_ENDINGS = ("_scale_inv", "_scale")

_OF_ACTIVATIONS = re.compile(r"[._](input|activation)_(scale(_ub|_inv)?|zero_point)$")
_OF_KV_CACHE = re.compile(r"\.[kvq]_scale$|\.[kvq]_proj\.output_scale$")

_UNKNOWN: Final = (
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.bitsandbytes__\w+$"), "bitsandbytes, 4 bits"),
    (re.compile(r"\.SCB$"), "bitsandbytes, 8 bits"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._(data|scale)$"), "quanto"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors, packed"),
    (re.compile(r"[._]weight_scale_2$|\.weight_global_scale$"), "nvfp4"),
    (re.compile(r"\.pre_quant_scale$"), "modelopt, AWQ"),
)
"""Names that only one way of quantising gives."""

_ANY_UNKNOWN: Final = re.compile("|".join(pattern.pattern for pattern, _ in _UNKNOWN))


@dataclass(frozen=True, slots=True)
class ScaledFp8:
    """A weight that is 8-bit floats.

    Attributes:
        codes, scales: names of the two tensors.
        block: extent of the blocks that share a scale, in every dimension of the codes.
    """

    codes: str
    scales: str
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedFp4:
    """A weight of experts in gpt-oss's MXFP4.

    Attributes:
        codes: name of the blocks, U8 ``[E, N, G, 16]``: two codes per byte.
        scales: name of the shared exponents, U8 ``[E, N, G]``.
    """

    codes: str
    scales: str


@dataclass(frozen=True)
class Quantisation:
    """What is stored as codes.

    Attributes:
        weights: by the name that the weight has when it is dequantised.
        dropped: tensors that mean nothing without the codes, with the reason.
        leftover: the methods that the config names although no weight is a code; else empty.
    """

    weights: dict[str, ScaledFp8 | PackedFp4] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()


def quantisation(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Quantisation | None:
    """Find out what is stored as codes.

    Args:
        specs: all tensors of the checkpoint.
        config: its ``config.json``.
        where: the checkpoint, for messages.

    Returns:
        None if nothing is.

    Raises:
        ModelError: weights are quantised in a way that is not known, or the tensors do not fit together.
    """
    settings = list(settings_of(config))
    for setting in settings:
        check_numbers(setting, where)
    are_numbers = all(_is_number(spec) for spec in specs.values())
    blocks = [] if are_numbers else [block for setting in settings for block in blocks_of(setting, where)]
    unknown = [name for name in specs if _ANY_UNKNOWN.search(name)]  # one look at each of perhaps 100 000 names
    for pattern, method in _UNKNOWN:
        found = next((name for name in unknown if pattern.search(name)), None)
        if found is not None:
            raise refusal(method, where, f"; it holds {found!r}")
    reading = _Reading(specs, blocks if settings else [DEFAULT_BLOCK])
    for spec in specs.values():
        reading.add(spec)
    if not settings and not reading.result.weights and not reading.problems:
        return None
    reading.check_rest()
    if reading.problems:
        shown, rest = reading.problems[:_MAX_LISTED], len(reading.problems) - _MAX_LISTED
        listed = "\n  ".join([*shown, *([f"... and {rest} more"] if rest > 0 else [])])
        raise ModelError(
            f"it holds quantised weights of an unknown format:\n  {listed}",
            where=where,
            remedy=REMEDY,
        )
    if are_numbers:
        return replace(reading.result, leftover=tuple(dict.fromkeys(map(method_of, settings))))
    return reading.result


def _is_number(spec: TensorSpec) -> bool:
    """Whether a tensor cannot be codes. Lists of integers and masks are not codes either."""
    if is_buffer(spec.name) or len(spec.shape) < 2:
        return spec.dtype not in _FP8
    return spec.dtype.is_floating and spec.dtype not in _FP8


class _Reading:
    """Goes through the tensors once, and once more through those that were not explained."""

    def __init__(self, specs: Mapping[str, TensorSpec], blocks: Sequence[tuple[int, int]]) -> None:
        self._specs = specs
        self._blocks = blocks
        self._read: set[str] = set()
        self.result = Quantisation()
        self.problems: list[str] = []

    def add(self, spec: TensorSpec) -> None:
        """Explain a tensor if it is codes."""
        if spec.dtype in _FP8:
            self._fp8(spec)
        elif spec.dtype is DType.U8 and spec.name.endswith("_blocks"):
            self._mxfp4(spec)
        elif not spec.dtype.is_floating and any(spec.name + end in self._specs for end in _SCALE_ENDINGS):
            self._read |= {spec.name, *(spec.name + end for end in _SCALE_ENDINGS)}
            self.problems.append(f"{spec.name}: {_described(spec)} with scales")

    def check_rest(self) -> None:
        """Explain the other tensors of a quantised model."""
        for name, spec in self._specs.items():
            if name in self._read:
                continue
            if _OF_ACTIVATIONS.search(name):
                self.result.dropped[name] = "a scale of activations: weights that are no codes do without it"
            elif _OF_KV_CACHE.search(name) and spec.num_elements == 1:
                self.result.dropped[name] = "a scale of the key-value cache: weights that are no codes do without it"
            elif (weight := _weight_of(name)) is not None and weight in self._specs:
                self.problems.append(f"{name}: {_described(spec)} beside {_described(self._specs[weight])} {weight}")
            elif name.endswith("_scale_inv"):
                self.problems.append(f"{name}: there is no {name.removesuffix('_scale_inv')}")
            elif name.endswith(".weight") and not spec.dtype.is_floating and len(spec.shape) > 1:
                self.problems.append(f"{name}: {_described(spec)} without scales")

    def _fp8(self, spec: TensorSpec) -> None:
        name = spec.name
        beside = [self._specs[name + end] for end in _SCALE_ENDINGS if name + end in self._specs]
        self._read |= {name, *(scales.name for scales in beside)}
        if len(beside) != 1:
            found = f"with both {' and '.join(s.name for s in beside)}" if beside else "without scales"
            self.problems.append(f"{name}: stored as 8-bit floats ({spec.dtype.value}) {found}")
            return
        [scales] = beside
        block = _block_of(spec.shape, scales.shape, self._blocks) if scales.dtype in _SCALE_DTYPES else None
        if block is None:
            self.problems.append(
                f"{name}: {_described(spec)} with scales {_described(scales)}, which are not per row, column or tensor"
                + "".join(f", nor per block of {rows}x{columns}" for rows, columns in self._blocks)
            )
            return
        self.result.weights[name] = ScaledFp8(name, scales.name, block)

    def _mxfp4(self, spec: TensorSpec) -> None:
        weight = spec.name.removesuffix("_blocks")
        scales = self._specs.get(f"{weight}_scales")
        if scales is None or scales.dtype is not DType.U8:
            return
        self._read |= {spec.name, scales.name}
        is_known = len(spec.shape) == 4 and spec.shape[3] == MXFP4_GROUP_BYTES and scales.shape == spec.shape[:3]
        if not is_known or weight in self._specs:
            also = f" beside {weight}" if weight in self._specs else ""
            self.problems.append(f"{spec.name}: {_described(spec)} with scales {_described(scales)}{also}")
            return
        self.result.weights[weight] = PackedFp4(spec.name, scales.name)


def _weight_of(name: str) -> str | None:
    """The weight that a scale or a zero point belongs to by its name."""
    for ending in (*_SCALE_ENDINGS, "_zero_point"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return None


def _block_of(
    codes: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> tuple[int, ...] | None:
    """The block that a scale is for, None if the shapes do not say."""
    if math.prod(scales) == 1:
        return tuple(max(1, size) for size in codes)
    if len(codes) < 2:
        return None
    *stack, rows, columns = codes
    if len(codes) == 2 and scales == (rows,):
        return (1, columns)
    ones = tuple(1 for _ in stack)
    if stack and scales in ((*stack,), (*stack, 1, 1)):
        return (*ones, rows, columns)
    for block_rows, block_columns in blocks:
        if scales == (*stack, -(-rows // block_rows), -(-columns // block_columns)):
            return (*ones, block_rows, block_columns)
    if scales == (*stack, rows, 1):
        return (*ones, 1, columns)
    if scales == (*stack, 1, columns):
        return (*ones, rows, 1)
    return None


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype.value} {list(spec.shape)}"
