"""Types of the fields that dense and MoE recipes share, and the base of all recipe models."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mergekit_ray.config.findings import (
    FINDINGS_ERROR,
    SETTINGS_ERROR,
    Finding,
    config_error,
    details_of,
    findings_of,
    found,
    to_problems,
)
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Issue, Level, Setting, dump_setting, parse_setting
from mergekit_ray.config.sizes import format_size, parse_size
from mergekit_ray.config.yaml_source import Document, format_path
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import nearest

DEFAULT_MAX_SHARD_BYTES = 2_000_000_000

COLLECTING = {"collecting": True}
"""Validation context under which models leave checks across fields to the caller, who reports all of them at once."""


class ComputeDType(enum.Enum):
    """What arithmetic is done in, whatever is stored."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    INPUTS = "inputs"
    """The dtype that mergekit would compute in: the recipe's ``dtype``, or that of the inputs."""


if TYPE_CHECKING:
    from pydantic import BaseModel as _Built
else:

    class _Constructor(type(BaseModel)):
        """Calling a class of a recipe's parts: fields by their names in Python too, and our errors."""

        def __call__(cls, /, *unnamed: Any, **data: Any) -> Any:
            fields = cls.model_fields
            if unnamed:
                first = next(iter(fields))
                raise ConfigError(
                    f"{cls.__name__} takes its fields by name, found {found(unnamed[0])} without one",
                    remedy=f"write {cls.__name__}({first}=...)",
                )
            written = {(fields[key].alias or key) if key in fields else key: value for key, value in data.items()}
            try:
                return super().__call__(**written)
            except ValidationError as error:
                findings = findings_of(details_of(error), cls)
            raise config_error(to_problems(findings, Document(None)), cls.__name__)

    class _Built(BaseModel, metaclass=_Constructor):
        pass


class RecipeModel(_Built):
    """Base of every part of a recipe: frozen, without keys that mean nothing; a key set to null is a key left out.

    Raises:
        ConfigError: when one is built in Python, with all that is wrong; `model_validate` raises pydantic's error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # built on first use, not at import

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return data

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What is not left at its default, references and enumerations as recipes write them."""
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if info.is_required() or value != info.get_default(call_default_factory=True):
                yield name, _plainly(value)


def _plainly(value: Any) -> Any:
    if isinstance(value, ModelReference):
        return str(value)
    return value.value if isinstance(value, enum.Enum) else value


def written(data: Mapping[str, Any]) -> str:
    """A recipe's data as the text of a file."""
    import yaml  # noqa: PLC0415 - few recipes are written

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return text


def raise_findings(findings: list[Finding]) -> None:
    """Make pydantic report ``findings``; nothing if there are only warnings.

    Raises:
        PydanticCustomError: at least one finding is an error.
    """
    errors = [finding for finding in findings if not finding.is_warning]
    if errors:
        parts = (": ".join(filter(None, (format_path(f.path), f.what, f.hint))) for f in errors)
        raise PydanticCustomError(FINDINGS_ERROR, "{text}", {"text": "; ".join(parts), "findings": errors})


def _parse_settings(value: object) -> Level:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping from parameters to values, found {found(value)}")
    level: dict[str, Setting] = {}
    issues: list[Issue] = []
    for name, raw in value.items():
        setting, wrong = parse_setting(raw)
        issues += [((str(name), *path), what, hint) for path, what, hint in wrong]
        if setting is not None:
            level[str(name)] = setting
    if issues:
        text = "; ".join(f"{format_path(path)}: {what}" for path, what, _ in issues)
        raise PydanticCustomError(SETTINGS_ERROR, "{text}", {"text": text, "issues": issues})
    return level


def _dump_settings(level: Level) -> dict[str, Any]:
    return {name: dump_setting(setting) for name, setting in level.items()}


def _parse_dtype(value: object) -> DType:
    if isinstance(value, DType) and value.is_floating:
        return value
    return DType.parse(value if isinstance(value, str) else str(value)[:60])


def _parse_compute_dtype(value: object) -> ComputeDType:
    if isinstance(value, ComputeDType):
        return value
    accepted = [dtype.value for dtype in ComputeDType]
    spelt = {"fp32": "float32", "float": "float32", "fp64": "float64", "double": "float64"}
    text = str(value).removeprefix("torch.").lower()
    text = spelt.get(text, text)
    if text not in accepted:
        raise ValueError(
            f"unknown compute_dtype {found(value)}; accepted: {', '.join(accepted)}{nearest(text, accepted)}"
        )
    return ComputeDType(text)


def _parse_layer_range(value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        shown = found(value) if not isinstance(value, list | tuple) else counted(len(value), "value")
        raise ValueError(f"expected [first layer, layer after the last], found {shown}\nwrite for example [0, 16]")
    bounds: list[int] = []
    for bound in value:
        number: object = bound
        if isinstance(number, str) and number.strip().isdecimal() and len(number) < 10:
            number = int(number)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"expected whole numbers of layers, found {found(bound)}")
        if abs(number) > 1 << 31:
            raise ValueError("expected numbers of layers, found one that is too large")
        bounds.append(number)
    start, end = bounds
    if start < 0 or end < 0:
        raise ValueError(
            f"layers are counted from 0, found [{start}, {end}]\nwrite the numbers out: none counts from the end"
        )
    if start >= end:
        what = "is empty" if start == end else "runs backwards"
        raise ValueError(f"the layer range [{start}, {end}] {what}; the end is not included\nwrite [first, last + 1]")
    return start, end


def _parse_text(value: object) -> object:
    """A name may look like a number; a path may be a `Path`."""
    if isinstance(value, PurePath) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    return value


def parse_patterns(value: object) -> object:
    """One pattern is short for a list of one."""
    return [value] if isinstance(value, str) else value


ParameterSettings = Annotated[
    Level,
    PlainValidator(_parse_settings),
    PlainSerializer(_dump_settings),
    WithJsonSchema({"title": "Parameters", "type": "object"}),
]
"""``parameters`` at one place: names to parsed settings; null is none."""

FloatDType = Annotated[
    DType,
    PlainValidator(_parse_dtype),
    PlainSerializer(lambda dtype: dtype.config_name),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["bfloat16", "float16", "float32", "float64"]},
                {"type": "string", "pattern": "^(torch\\.)?(bf16|f16|fp16|half|f32|fp32|float|f64|fp64|double)$"},
            ]
        }
    ),
]
"""A floating dtype by any of its names."""

ArithmeticDType = Annotated[
    ComputeDType,
    PlainValidator(_parse_compute_dtype),
    PlainSerializer(lambda dtype: dtype.value),
    WithJsonSchema({"enum": [dtype.value for dtype in ComputeDType]}),
]

LayerRange = Annotated[
    tuple[int, int],
    PlainValidator(_parse_layer_range),
    PlainSerializer(list),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}),
]
"""First layer and the layer after the last, counted from 0."""

ByteSize = Annotated[
    int,
    PlainValidator(parse_size),
    PlainSerializer(format_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\s*(\d+\.?\d*|\.\d+)\s*([kKmMgGtT][iI]?)?[bB]?\s*$"},
            ]
        }
    ),
]
"""A number of bytes, such as ``2GB`` (see `mergekit_ray.config.sizes`)."""

Name = Annotated[
    str,
    BeforeValidator(_parse_text),
    Field(min_length=1),
    WithJsonSchema({"type": ["string", "number"], "minLength": 1}),
]

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


def parse_seed(value: object) -> int:
    """A seed that comes from elsewhere than a recipe, which takes the same ones.

    Raises:
        ConfigError: it is not a whole number from 0 to 2^63 - 1.
    """
    try:
        seed: int = TypeAdapter(Seed).validate_python(value)
    except ValidationError:
        raise ConfigError(
            f"the seed {repr(value)[:60]} is not a whole number from 0 to {(1 << 63) - 1} (2^63 - 1)",
            remedy="give another `seed=`",
        ) from None
    return seed


class OutputOptions(RecipeModel):
    """Where the result goes. ``output: ./merged`` is short for ``output: {path: ./merged}``.

    Attributes:
        path: folder or URI of the result. The command line's second argument overrides it.
        max_shard_size: size of the largest output file, unless one layer is larger, e.g. ``2GB`` or ``2GiB``.
    """

    path: Name | None = None
    max_shard_size: ByteSize = DEFAULT_MAX_SHARD_BYTES

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            path: str | PurePath | None = ...,
            max_shard_size: int | str = ...,
        ) -> None: ...


def _parse_output(value: object) -> object:
    if value is None:
        return OutputOptions()
    return {"path": value} if isinstance(value, str | PurePath) else value


def place(output: OutputOptions) -> str:
    """Where the result goes, for the end of a line."""
    return "" if output.path is None else f" to {output.path}"


Output = Annotated[OutputOptions, BeforeValidator(_parse_output)]
