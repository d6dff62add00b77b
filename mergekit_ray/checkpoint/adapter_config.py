"""``adapter_config.json``: what of it decides how a LoRA is applied, and what cannot be applied."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import SchemaError, SchemaValidator, core_schema

from mergekit_ray.checkpoint.strict_json import parse_config
from mergekit_ray.core.errors import CheckpointError, ModelError

ADAPTER_CONFIG_NAME = "adapter_config.json"

_DEFAULT_RANK = 8
_MAX_RANK = 1 << 31
_MAX_SHOWN = 100
_DEFAULT_ALPHA = 8

_MERGE_WITH_PEFT = "merge the adapter into its base with PEFT (merge_and_unload) and name the result"
_NEVER_MERGED = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
        *("CARTRIDGE", "XLORA", "POLY"),
    }
)
"""Kinds that put something before the text or into attention, or that route between adapters."""

_REFUSED = {
    "layer_replication": ("it repeats layers of its base (layer_replication)", _MERGE_WITH_PEFT),
    "alora_invocation_tokens": (
        "it acts on a part of the text only (activated LoRA, alora_invocation_tokens), which no weights can express",
        "use it as an adapter",
    ),
    "arrow_config": ("it routes between adapters (arrow_config), which no weights can express", "use it as an adapter"),
    "use_qalora": ("it is a QALoRA (use_qalora), made for quantised weights", _MERGE_WITH_PEFT),
    "use_bdlora": ("its factors are block-diagonal (use_bdlora)", _MERGE_WITH_PEFT),
    "kasa_config": ("it is a KaSA (kasa_config), which changes the base as well", _MERGE_WITH_PEFT),
    "velora_config": ("it is a VeLoRA (velora_config)", _MERGE_WITH_PEFT),
    "monteclora_config": ("it is a MonteCLoRA (monteclora_config)", _MERGE_WITH_PEFT),
    "megatron_config": ("it was trained with Megatron's layers (megatron_config)", _MERGE_WITH_PEFT),
}
"""Settings that change what applying means, each with what it is called and what to do about it."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that subtract the first factors from the base, so that the base is another one."""

_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size"),
        *("runtime_config", "merge_weights", "enable_lora", "bias", "lora_bias", "init_lora_weights", "peft_type"),
    }
)
"""Settings of training, and what the tensors themselves tell."""

_USED = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora"),
        *("modules_to_save", "ensure_weight_tying", "trainable_token_indices", "target_parameters"),
    }
)

_READ_OTHERWISE = re.compile(r"\[\[|--|&&|~~|[*+?}]\+|\\[<>]")
"""What Rust reads otherwise than Python: operations on sets, possessive repeats, borders of words."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of an adapter.

    Attributes:
        content: of the file.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: by a regular expression for the end of a module's name; the first that matches
            counts.
        rank_stabilised: scale by ``alpha / √rank`` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) instead of
            ``alpha / rank``.
        fan_in_fan_out: the adapted matrices lie as inputs by outputs.
        dora: every change has a magnitude.
        saved: endings of the names of modules that are stored whole (``modules_to_save``).
        keeps_ties: tied modules that are stored whole stay tied (``ensure_weight_tying``).
        tokens: rows of embeddings that are stored (``trainable_token_indices``), by the ending of the module's name;
            the empty one stands for all modules.
        parameters: endings of the names of parameters that are adapted as such (``target_parameters``).
        warnings: settings that are not known, or stand there twice.
    """

    content: Mapping[str, Any]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    fan_in_fan_out: bool
    dora: bool
    saved: tuple[str, ...]
    keeps_ties: bool
    tokens: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    warnings: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank that the module should have."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the module's factors is multiplied by."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def is_saved(self, module: str) -> bool:
        """Whether the module is one of ``modules_to_save``."""
        return any(module.endswith(ending) for ending in self.saved)

    def parameters_of(self, module: str) -> list[str]:
        """Names of the parameters of a module that are adapted as such."""
        split = [name.rpartition(".") for name in self.parameters]
        return sorted({leaf for outer, _, leaf in split if f".{module}".endswith(f".{outer}") or not outer})

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows that are stored of a module, none if it says nothing of them."""
        return next((rows for ending, rows in self.tokens.items() if module.endswith(ending)), ())


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns.items() if _matcher(pattern).isinstance_python(module)), default)


@functools.lru_cache(maxsize=4096)
def _matcher(pattern: str) -> SchemaValidator:
    """Of names that a pattern matches, as PEFT looks it up: by whole components at the end of the name.

    Rust's regular expressions take time linear in the name's length. A stranger's pattern could keep Python's busy for
    ever.

    Raises:
        ValueError: it is not a regular expression, or cannot be matched in linear time.
    """
    if _READ_OTHERWISE.search(pattern):
        raise ValueError("with operations on sets, possessive repeats or \\< and \\>")
    whole = rf"^(.*\.)?({pattern})$"
    try:
        re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"which is not a regular expression: {error}") from None
    try:
        return SchemaValidator(core_schema.str_schema(pattern=whole, regex_engine="rust-regex"))
    except SchemaError as error:
        raise ValueError(f"which cannot be matched in bounded time: {str(error).splitlines()[-1].strip()}") from None


def parse_adapter_config(data: bytes, where: str) -> AdapterConfig:
    """Parse the file.

    Raises:
        CheckpointError: not JSON, or a setting of another type than PEFT writes.
        ModelError: another method than LoRA, or a variant that cannot be applied.
    """
    content, twice = parse_config(data, where, "adapter config")
    kind = content.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(
            f"this is an adapter of the kind {kind!r}; only LoRA can be applied",
            where=where,
            remedy="use it as an adapter: no weights of the base can express it"
            if str(kind) in _NEVER_MERGED
            else _MERGE_WITH_PEFT,
        )
    for key, (what, remedy) in _REFUSED.items():
        if content.get(key):
            raise ModelError(f"the adapter cannot be applied: {what}", where=where, remedy=remedy)
    initial = content.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_BASE_CHANGING):
        raise ModelError(
            f"the adapter belongs to a base that its initialisation changed (init_lora_weights: {initial!r})",
            where=where,
            remedy="convert it to a LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion), "
            f"or {_MERGE_WITH_PEFT}",
        )
    unknown = sorted(key for key, value in content.items() if value and key not in _HARMLESS | _USED)
    return AdapterConfig(
        content=content,
        rank=_number(content, "r", _DEFAULT_RANK, where, whole=True),
        alpha=_number(content, "lora_alpha", _DEFAULT_ALPHA, where),
        rank_pattern=_patterns(content, "rank_pattern", where, whole=True),
        alpha_pattern=_patterns(content, "alpha_pattern", where),
        rank_stabilised=_flag(content, "use_rslora", where),
        fan_in_fan_out=_flag(content, "fan_in_fan_out", where),
        dora=_flag(content, "use_dora", where),
        saved=_names(content, "modules_to_save", where),
        keeps_ties=_flag(content, "ensure_weight_tying", where),
        tokens=_tokens(content, where),
        parameters=_names(content, "target_parameters", where),
        warnings=(
            *(f"{key} in {ADAPTER_CONFIG_NAME} is not known, and has no effect" for key in unknown),
            *(f"{key} occurs twice in {ADAPTER_CONFIG_NAME}; its last value is read, as PEFT does" for key in twice),
        ),
    )


def _fault(what: str, where: str) -> CheckpointError:
    return CheckpointError(what, where=where, remedy="save the adapter with PEFT again")


def _is_number(value: object, *, whole: bool) -> bool:
    if isinstance(value, bool):
        return False
    if whole:
        return isinstance(value, int) and 0 < value <= _MAX_RANK
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # a NaN is not


def _number(content: Mapping[str, Any], key: str, default: int, where: str, *, whole: bool = False) -> Any:
    value = content.get(key, default)
    if not _is_number(value, whole=whole):
        raise _fault(f"{key} is {value!r}, not a {'positive whole ' if whole else ''}number", where)
    return value


def _patterns(content: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict) or not all(_is_number(number, whole=whole) for number in value.values()):
        raise _fault(f"{key} does not map names to {'positive whole ' if whole else ''}numbers", where)
    for pattern in value:
        try:
            _matcher(pattern)
        except ValueError as error:
            shown = pattern if len(pattern) <= _MAX_SHOWN else f"{pattern[:_MAX_SHOWN]}…"
            raise CheckpointError(
                f"{key} holds {shown!r}, {error}", where=where, remedy="name the modules instead, one entry each"
            ) from None
    return value


def _flag(content: Mapping[str, Any], key: str, where: str) -> bool:
    value = content.get(key) or False
    if not isinstance(value, bool):
        raise _fault(f"{key} is {value!r}, neither true nor false", where)
    return value


def _names(content: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = content.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _fault(f"{key} is not a list of names", where)
    return tuple(value)


def _tokens(content: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    key = "trainable_token_indices"
    value = content.get(key) or {}
    by_module = {"": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict) or not all(map(_are_rows, by_module.values())):
        raise _fault(f"{key} is neither a list of different tokens nor a mapping from names to such lists", where)
    return {name: tuple(rows) for name, rows in by_module.items()}


def _are_rows(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(row, int) and not isinstance(row, bool) for row in value):
        return False
    return len(set(value)) == len(value) and all(0 <= row < _MAX_RANK for row in value)
