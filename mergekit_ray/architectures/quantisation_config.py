"""What ``config.json`` says of quantisation: which methods are known, and which blocks they share scales in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from mergekit_ray.core.errors import ModelError

CONFIG_KEYS: Final = ("quantization_config", "compression_config")
"""Where ``config.json``, or a part of it for one modality, says how its weights are stored."""

SIDE_FILES: Final = frozenset(
    {"hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json"}
)
"""Files with the same settings. They would be wrong beside dequantised weights."""

REMEDY: Final = (
    "read are fp8 with a scale per block, row or tensor and gpt-oss's mxfp4; "
    "name an unquantised copy of the model, or dequantise it first"
)

DEFAULT_BLOCK: Final = (128, 128)
"""DeepSeek-V3's, for configs that name none."""


def settings_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config and its parts say of quantisation."""
    for key, value in config.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if key in CONFIG_KEYS:
            yield value
        else:
            yield from settings_of(value)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose weights are no codes; parts that are left as they are are not copied."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def blocks_of(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """The blocks a config names, in rows and columns.

    Raises:
        ModelError: it names an unknown method.
    """
    method = method_of(settings)
    read = _METHODS.get(method)
    if read is None:
        raise refusal(method, where)
    return read(settings, where)


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that settings name."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or "unknown method")


def check_numbers(settings: Mapping[str, Any], where: str) -> None:
    """Reject numbers that are not the weights themselves: rotated, sparse, or of a 1.58-bit model.

    Raises:
        ModelError: they do not.
    """
    method = method_of(settings)
    if method == "bitnet":  # whose layers round the weights whenever they compute with them
        raise refusal(method, where)
    if method != "compressed-tensors":
        return
    if settings.get("transform_config"):
        raise refusal(f"{method}, rotated", where)
    form = _part(settings, "sparsity_config", where).get("format", "dense")
    if form != "dense":
        raise refusal(f"{method}, {form}", where)


def _fine_grained(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """DeepSeek-V3's blocks; none if the size is null."""
    if settings.get("expert_dtype") == "fp4":
        raise refusal("fp8 with experts in fp4", where)
    return _pair(settings.get("weight_block_size", DEFAULT_BLOCK), where)


def _compressed_tensors(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """Symmetric 8-bit floats of every strategy. Source: compressed-tensors, ``QuantizationArgs``."""
    method = "compressed-tensors"
    blocks = []
    for group in _part(settings, "config_groups", where).values():
        if isinstance(group, Mapping) and group.get("weights") is None:
            continue
        weights = _part(group, "weights", where) if isinstance(group, Mapping) else {}
        described = f"{method}, {weights.get('type', 'unknown type')} of {weights.get('num_bits', '?')} bits"
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            raise refusal(described, where)
        if weights.get("symmetric") is False:
            raise refusal(f"{described}, not symmetric", where)
        if isinstance(size := weights.get("group_size"), int) and size > 0:
            blocks.append((1, size))
        structure = weights.get("block_structure")
        blocks += _pair(structure.split("x") if isinstance(structure, str) else structure, where)
    return blocks


def _modelopt(settings: Mapping[str, Any], where: str) -> list[tuple[int, int]]:
    """8-bit floats with a scale per tensor, row or block. Source: vLLM's documentation of ModelOpt's ``quant_algo``."""
    algorithm = settings.get("quant_algo")
    if algorithm is None:
        return []
    blocks = _MODELOPT_BLOCKS.get(str(algorithm).upper())
    if blocks is None:
        raise refusal(f"modelopt, {algorithm!s:.60}", where)
    return blocks


_MODELOPT_BLOCKS: Final[Mapping[str, list[tuple[int, int]]]] = {
    "FP8": [],
    "FP8_PER_CHANNEL_PER_TOKEN": [],
    "FP8_PB_WO": [DEFAULT_BLOCK],
}
"""By the algorithm that a config of modelopt names; where it names none, nothing but the key-value cache is."""


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
    "modelopt": _modelopt,
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


def refusal(method: str, where: str, more: str = "") -> ModelError:
    """The error of a checkpoint that is quantised in a way that is not read."""
    return ModelError(
        f"its weights are quantised ({method}): an average of codes means nothing{more}", where=where, remedy=REMEDY
    )
