"""Settings: one parameter of a recipe before it is known for which tensor.

A setting is a scalar, a gradient (a list of numbers, interpolated over the layers of its slice), or a list of
``{filter, value}`` whose values are scalars or gradients. `parse_setting` reads any spelling once; `resolve` then finds
the value at one output tensor in about a microsecond, without pydantic.

Precedence, first hit wins: the slice source's ``parameters``, the model's, the output slice's, the module's, the top
level's. A level whose filters all miss falls through to the next. (mergekit, README "Parameter Specification".)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ValidationError

from mergekit_ray.config.findings import found, wanted
from mergekit_ray.config.yaml_source import YamlPath
from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.errors import ConfigError, MergeError
from mergekit_ray.core.expressions import Scalar
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import matches

Gradient: TypeAlias = tuple[float, ...]
"""At least two values at equal distances over the layers of a slice."""


class Missing(Enum):
    """The type of `MISSING`."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING
"""Nothing is set: not the same as a value of None."""


@dataclass(frozen=True, slots=True)
class Case:
    """A value for the tensors that ``filter`` `matches`; for all of them if it is None (``*`` in the YAML)."""

    filter: str | None
    value: Scalar | Gradient


@dataclass(frozen=True, slots=True)
class Conditional:
    """Cases; the first that matches counts."""

    cases: tuple[Case, ...]

    def match(self, tensor_name: str) -> Scalar | Gradient | Literal[Missing.MISSING]:
        """The value for a tensor, MISSING if no case matches."""
        for case in self.cases:
            if case.filter is None or matches(case.filter, tensor_name):
                return case.value
        return MISSING


Setting: TypeAlias = Scalar | Gradient | Conditional
Level: TypeAlias = Mapping[str, Setting]
"""The ``parameters`` of one place in a recipe."""

Issue: TypeAlias = tuple[YamlPath, str, str]
"""A path below the setting, what is wrong there, and a hint."""

_CASE_KEYS = ("filter", "value")


def parse_setting(raw: object) -> tuple[Setting, list[Issue]]:
    """Read one setting as YAML gives it.

    Lists of one element and of equal elements become scalars, numbers in quotes become numbers, null means not set.

    Returns:
        The setting (None where it cannot be read) and all that is wrong with it.
    """
    if isinstance(raw, Conditional):
        return raw, []
    if isinstance(raw, Mapping):
        case, issues = _parse_case(raw, ())
        return (None if case is None else Conditional((case,))), issues
    if isinstance(raw, list | tuple) and any(isinstance(item, Mapping) for item in raw):
        cases: list[Case] = []
        problems: list[Issue] = []
        for index, item in enumerate(raw):
            if not isinstance(item, Mapping):
                problems.append(((index,), f"expected {{filter, value}} like its neighbours, found {found(item)}", ""))
                continue
            case, wrong = _parse_case(item, (index,))
            problems += wrong
            if case is not None:
                cases.append(case)
        return (None if problems else Conditional(tuple(cases))), problems
    return _parse_value(raw, ())


def _parse_case(raw: Mapping[Any, Any], path: YamlPath) -> tuple[Case | None, list[Issue]]:
    issues: list[Issue] = []
    for key in raw:
        if key not in _CASE_KEYS:
            what = f"unknown key {found(key)}{nearest(str(key), _CASE_KEYS)}"
            issues.append(((*path, str(key)), what, "a conditional value has `filter` and `value`"))
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        hint = "a filter is part of a tensor's name, such as self_attn or mlp; quote it"
        issues.append(((*path, "filter"), f"expected text, found {found(pattern)}", hint))
    value: Scalar | Gradient = None
    if raw.get("value") is None:
        if not issues:
            issues.append((path, "a conditional value without `value`", "write {filter: mlp, value: 0.5}"))
    elif isinstance(raw["value"], list | tuple) and any(isinstance(item, Mapping) for item in raw["value"]):
        issues.append(((*path, "value"), "conditions inside a condition", "list all {filter, value} side by side"))
    else:
        value, wrong = _parse_value(raw["value"], (*path, "value"))
        issues += wrong
    if issues:
        return None, issues
    return Case(None if pattern is None or pattern == "*" else str(pattern), value), []


def _parse_value(raw: object, path: YamlPath) -> tuple[Scalar | Gradient, list[Issue]]:
    if not isinstance(raw, list | tuple):
        value, what = _parse_scalar(raw)
        return value, [(path, what, "")] if what else []
    if not raw:
        return None, [(path, "an empty list", "write a number, or a list of numbers to interpolate over the layers")]
    values: list[Scalar] = []
    issues: list[Issue] = []
    for index, item in enumerate(raw):
        value, what = _parse_scalar(item)
        if value is None and not what:
            what = "expected a number, found nothing"
        if what:
            issues.append(((*path, index), what, ""))
        values.append(value)
    if issues:
        return None, issues
    if all(value == values[0] for value in values):
        return values[0], []
    numbers: list[float] = []
    for index, value in enumerate(values):
        number = _boolean_word(value) if isinstance(value, str) else value
        if isinstance(number, str) or number is None:
            hint = "a list is interpolated over the layers; use {filter, value} to choose between words"
            issues.append(((*path, index), f"expected a number, found {found(value)}", hint))
        else:
            numbers.append(float(number))
    return (None, issues) if issues else (tuple(numbers), [])


def _parse_scalar(raw: object) -> tuple[Scalar, str]:
    """The value and, if it cannot be one, why."""
    if raw is None or isinstance(raw, bool):
        return raw, ""
    if isinstance(raw, str):
        try:
            number = float(raw)
        except ValueError:
            return raw, ""
        return _finite(number, raw)
    if isinstance(raw, int):
        # Beyond 2**1023 there is no float; such a number is a mistake.
        return (raw, "") if abs(raw) < 1 << 1023 else (None, "expected a number, found one that is too large")
    if isinstance(raw, float):
        return _finite(raw, raw)
    return None, f"expected a number, a list or {{filter, value}}, found {found(raw)}"


def _finite(number: float, raw: object) -> tuple[Scalar, str]:
    return (number, "") if math.isfinite(number) else (None, f"expected a finite number, found {found(raw)}")


def _boolean_word(word: str) -> bool | str:
    return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(word.lower(), word)


def dump_setting(setting: Setting) -> Any:
    """A setting as plain YAML data that `parse_setting` reads back to an equal one."""
    if isinstance(setting, Conditional):
        return [{"filter": case.filter or "*", "value": dump_setting(case.value)} for case in setting.cases]
    return list(setting) if isinstance(setting, tuple) else setting


def gradient_position(index: int, num_layers: int) -> float:
    """``t`` of layer ``index`` (from 0) in a slice of ``num_layers``: 0 at the first, 1 at the last and at an only one.

    Tensors outside the layers are resolved at ``t = 0``.
    """
    return index / (num_layers - 1) if num_layers > 1 else 1.0


def interpolate(gradient: Gradient, t: float) -> float:
    """Piecewise linear through ``gradient`` at equal distances, exact at its values; ``t`` in [0, 1]."""
    last = len(gradient) - 1
    x = t * last
    index = int(x)
    if index >= last:
        return gradient[last]
    # At a distance from the knot, not a blend of both ends: equal neighbours then give exactly their value.
    return gradient[index] + (gradient[index + 1] - gradient[index]) * (x - index)


def resolve(levels: Sequence[Level | None], name: str, tensor_name: str, t: float) -> Scalar | Literal[Missing.MISSING]:
    """The value of one parameter at one output tensor.

    Args:
        levels: the ``parameters`` in order of precedence.
        name: of the parameter, as in the YAML.
        tensor_name: full name of the output tensor, which filters are searched in.
        t: place in the slice, from `gradient_position`; 0 outside the layers.

    Returns:
        The value, or MISSING if no level has one for this tensor.
    """
    for level in levels:
        setting = level.get(name) if level else None
        value = setting.match(tensor_name) if isinstance(setting, Conditional) else setting
        if value is None or value is MISSING:
            continue
        return interpolate(value, t) if isinstance(value, tuple) else value
    return MISSING


def is_set(levels: Sequence[Level | None], name: str) -> bool:
    """Whether any level has a setting of ``name``, for whatever tensors."""
    return any(level is not None and level.get(name) is not None for level in levels)


def scalars(setting: Setting) -> list[tuple[YamlPath, Scalar]]:
    """Every value a setting may take at its knots, with the path below it."""
    if isinstance(setting, Conditional):
        many = len(setting.cases) > 1
        return [
            (((index, "value", *path) if many else ("value", *path)), value)
            for index, case in enumerate(setting.cases)
            for path, value in scalars(case.value)
        ]
    if isinstance(setting, tuple):
        return [((index,), value) for index, value in enumerate(setting)]
    return [((), setting)]


def gradients(setting: Setting) -> list[Gradient]:
    """Every gradient within a setting."""
    values = [case.value for case in setting.cases] if isinstance(setting, Conditional) else [setting]
    return [value for value in values if isinstance(value, tuple)]


@lru_cache(maxsize=4096, typed=True)
def coerce(declared: type[Parameters], name: str, value: Scalar) -> Scalar:
    """``value`` in the type that the parameter's field declares (``1.0`` or ``"true"`` for a boolean, ...).

    Raises:
        ValueError: the field does not accept it; the message says what it wants.
    """
    key = _field_name(declared, name)
    try:
        model: BaseModel = declared.model_validate({name: value})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            if detail["loc"][:1] in ((name,), (key,)):
                raise ValueError(wanted(detail)) from None
        # Only other fields are missing: give them anything, to read this one back from a validated instance.
        return _coerce_alone(declared, name, value)
    result: Scalar = getattr(model, key)
    return result


def _coerce_alone(declared: type[Parameters], name: str, value: Scalar) -> Scalar:
    from pydantic import TypeAdapter  # noqa: PLC0415 - rarely needed, and slow to import

    field = declared.model_fields[_field_name(declared, name)]
    annotation: Any = field.annotation
    result: Scalar = TypeAdapter(annotation).validate_python(value)
    return result


def _field_name(declared: type[Parameters], name: str) -> str:
    return next(key for key, field in declared.model_fields.items() if name in (field.alias, key))


class Resolver:
    """All parameters of one model (or the global ones) of a method, ready to be asked for many tensors.

    Values are brought to their declared types and levels searched once here; `at` only matches filters and
    interpolates.

    Args:
        declared: the method's ``model_parameters`` or ``global_parameters``.
        levels: the recipe's ``parameters`` in order of precedence.
        owner: what the parameters belong to, for messages: a model, or a method.

    Raises:
        ConfigError: a value is not what its field accepts.
    """

    def __init__(self, declared: type[Parameters], levels: Sequence[Level | None], owner: str = "") -> None:
        self._declared = declared
        self._owner = owner
        self._constant: dict[str, Scalar] = {}
        self._varying: dict[str, list[Setting]] = {}
        self._defaults: dict[str, Scalar | Literal[Missing.MISSING]] = {}
        for key, info in declared.model_fields.items():
            name = str(info.alias or key)
            self._defaults[name] = MISSING if info.is_required() else info.get_default(call_default_factory=True)
            given = [level[name] for level in levels if level and level.get(name) is not None]
            try:
                settings = [_coerce_setting(declared, name, setting) for setting in given]
            except ValueError as error:
                raise ConfigError(f"{name}: {error}", where=owner or None) from None
            if settings and not isinstance(settings[0], Conditional | tuple):
                self._constant[name] = settings[0]
            elif not settings and self._defaults[name] is not MISSING:
                self._constant[name] = self._defaults[name]  # type: ignore[assignment] # not MISSING, which mypy cannot follow through a dict
            else:
                self._varying[name] = settings
        if not self._varying:
            self._check_together(self._constant, owner)

    def at(self, tensor_name: str, t: float) -> dict[str, Scalar]:
        """The method's parameters at one output tensor, defaults included, by their YAML names.

        Args:
            tensor_name: full name of the output tensor.
            t: place in the slice, from `gradient_position`.

        Raises:
            ConfigError: a required parameter has no value for this tensor, or the values do not go together.
        """
        if not self._varying:
            return dict(self._constant)
        values = dict(self._constant)
        for name, settings in self._varying.items():
            value: Any = MISSING
            for setting in settings:
                value = setting.match(tensor_name) if type(setting) is Conditional else setting
                if value is not MISSING:
                    break
            else:
                value = self._defaults[name]
            if value is MISSING:
                owner = f" of {self._owner}" if self._owner else ""
                raise ConfigError(
                    f"the parameter {name!r}{owner} has no value for the tensor {tensor_name}",
                    remedy="its filters leave the tensor out: add a last entry without `filter`"
                    if settings
                    else f"set {name} under `parameters` of the model, the slice or the recipe",
                )
            values[name] = interpolate(value, t) if type(value) is tuple else value
        self._check_together(values, f"{self._owner}, tensor {tensor_name}" if self._owner else f"tensor {tensor_name}")
        return values

    def _check_together(self, values: Mapping[str, Any], where: str) -> None:
        try:
            self._declared.check_together(values)
        except MergeError as error:
            raise ConfigError(error.what, where=where or None, remedy=error.remedy) from None


def _coerce_setting(declared: type[Parameters], name: str, setting: Setting) -> Setting:
    if isinstance(setting, Conditional):
        return Conditional(tuple(Case(c.filter, _coerce_value(declared, name, c.value)) for c in setting.cases))
    return _coerce_value(declared, name, setting)


def _coerce_value(declared: type[Parameters], name: str, value: Scalar | Gradient) -> Scalar | Gradient:
    if not isinstance(value, tuple):
        return coerce(declared, name, value)
    for number in value:
        coerce(declared, name, number)
    check_gradient(declared, name, value)
    return value


def check_gradient(declared: type[Parameters], name: str, gradient: Gradient) -> None:
    """Check that a parameter takes what lies between a gradient's values, as yes-or-no and whole numbers do not.

    Raises:
        ValueError: it does not.
    """
    for start, end in pairwise(gradient):
        try:
            coerce(declared, name, start + (end - start) * 0.381966 if start != end else start)
        except ValueError:
            what = f"cannot vary gradually over the layers: there is nothing between {start:g} and {end:g}"
            raise ValueError(what) from None
