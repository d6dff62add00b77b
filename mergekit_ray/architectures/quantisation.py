"""How the weights of a checkpoint are stored when they are codes: which tensors belong together, and what they mean.

What is known is read off names, dtypes and shapes, and off the ``quantization_config`` where those leave a choice:

    <w>  F8_E4M3, F8_E5M2     <w>_scale_inv, <w>_scale     8-bit floats; a scale per block, row, column or tensor
    <w>_blocks  U8            <w>_scales  U8               MXFP4 in gpt-oss's layout

Both kinds of scale are multiplied with (``inv`` means that it undoes the quantisation). Everything else that is
quantised is refused by name: an average of codes means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions.quantised import FP8_NON_FINITE, MXFP4_GROUP_BYTES
from mergekit_ray.core.tensors import TensorSpec

CONFIG_KEYS: Final = ("quantization_config", "compression_config")
"""Where ``config.json``, or a part of it for one modality, says how its weights are stored."""

SIDE_FILES: Final = frozenset(
    {"hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json"}
)
"""Files that say the same. Beside weights that are no codes they would be wrong."""

_REMEDY: Final = (
    "read are fp8 with a scale per block, row or tensor and gpt-oss's mxfp4; "
    "name an unquantised copy of the model, or dequantise it first"
)

_DEFAULT_BLOCK: Final = (128, 128)
"""That of DeepSeek-V3, where a config says nothing."""

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
    """

    weights: dict[str, ScaledFp8 | PackedFp4] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


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
    settings = list(_settings(config))
    blocks = [block for setting in settings for block in _blocks(setting, where)]
    unknown = [name for name in specs if _ANY_UNKNOWN.search(name)]  # one look at each of perhaps 100 000 names
    for pattern, method in _UNKNOWN:
        found = next((name for name in unknown if pattern.search(name)), None)
        if found is not None:
            raise _refusal(method, where, f"; it holds {found!r}")
    reading = _Reading(specs, blocks if settings else [_DEFAULT_BLOCK])
    for spec in specs.values():
        reading.add(spec)
    if not settings and not reading.result.weights and not reading.problems:
        return None
    reading.check_rest()
    if reading.problems:
        shown, rest = reading.problems[:_MAX_LISTED], len(reading.problems) - _MAX_LISTED
        listed = "\n  ".join([*shown, *([f"... and {rest} more"] if rest > 0 else [])])
        raise ModelError(
            f"it holds codes whose meaning is not known:\n  {listed}",
            where=where,
            remedy=_REMEDY,
        )
    return reading.result


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
        """Explain what stands beside the codes of a quantised model."""
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


def _settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config and its parts say of quantisation."""
    for key, value in config.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if key in CONFIG_KEYS:
            yield value
        else:
            yield from _settings(value)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose weights are no codes; parts that are left as they are are not copied."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _blocks(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """The blocks a config names, in rows and columns.

    Raises:
        ModelError: it speaks of a method that is not known.
    """
    method = str(settings.get("quant_method") or "unknown method")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    read = _METHODS.get(method)
    if read is None:
        raise _refusal(method, where)
    return read(settings, where)


def _fine_grained(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """DeepSeek-V3's blocks; a size of null says that there are none."""
    if settings.get("expert_dtype") == "fp4":
        raise _refusal("fp8 with experts in fp4", where)
    return _pair(settings.get("weight_block_size", _DEFAULT_BLOCK), where)


def _compressed_tensors(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """Symmetric 8-bit floats of every strategy. Source: compressed-tensors, ``QuantizationArgs``."""
    method = "compressed-tensors"
    if settings.get("transform_config"):
        raise _refusal(f"{method}, rotated", where)
    form = _part(settings, "sparsity_config", where).get("format", "dense")
    if form != "dense":
        raise _refusal(f"{method}, {form}", where)
    blocks = []
    for group in _part(settings, "config_groups", where).values():
        if isinstance(group, Mapping) and group.get("weights") is None:
            continue
        weights = _part(group, "weights", where) if isinstance(group, Mapping) else {}
        described = f"{method}, {weights.get('type', 'unknown type')} of {weights.get('num_bits', '?')} bits"
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            raise _refusal(described, where)
        if weights.get("symmetric") is False:
            raise _refusal(f"{described}, not symmetric", where)
        if isinstance(size := weights.get("group_size"), int) and size > 0:
            blocks.append((1, size))
        structure = weights.get("block_structure")
        blocks += _pair(structure.split("x") if isinstance(structure, str) else structure, where)
    return blocks


def _part(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The settings below a key, none where it says nothing."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise ModelError(
            f"its quantization_config gives {key} as {found!r:.200}", where=where, remedy="correct config.json"
        )
    return found


def _no_blocks(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:  # noqa: ARG001 - as the others
    return []


_METHODS: Final[Mapping[str, Callable[[Mapping[str, Any], str], list[tuple[int, int]]]]] = {
    "fp8": _fine_grained,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _no_blocks,
    "mxfp4": _no_blocks,
}
"""Known values of ``quant_method``, with what finds their blocks."""


def _pair(value: Any, where: str) -> list[tuple[int, int]]:
    """Rows and columns of a block; nothing where none is given."""
    if value is None:
        return []
    try:
        rows, columns = (int(size) for size in value)
    except (TypeError, ValueError, OverflowError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ModelError(
            f"its quantization_config gives blocks of {value!r:.200}",
            where=where,
            remedy="a block is two sizes, rows and columns: correct config.json",
        )
    return [(rows, columns)]


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype.value} {list(spec.shape)}"


def _refusal(method: str, where: str, more: str = "") -> ModelError:
    return ModelError(
        f"its weights are quantised ({method}): an average of codes means nothing{more}", where=where, remedy=_REMEDY
    )
