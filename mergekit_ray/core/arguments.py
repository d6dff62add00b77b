"""What Python's callers give: a value of the wrong kind is a `ConfigError` that names it, not Python's own error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mergekit_ray.core.errors import ConfigError

T = TypeVar("T")


def check_fields(options: object, accepted: Mapping[str, tuple[bool, str]]) -> None:
    """Check the fields of options.

    Args:
        options: the object that has them.
        accepted: by the name of each field: whether its value is sound, and what would be.

    Raises:
        ConfigError: naming the first field that is not sound.
    """
    for name, (is_sound, wanted) in accepted.items():
        if not is_sound:
            value = repr(getattr(options, name))[:60]
            raise ConfigError(f"{name} is {value}", where=type(options).__name__, remedy=f"give {wanted}")


def check_argument(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Check the type of an argument.

    Raises:
        ConfigError: the value is of none of ``kinds``; ``wanted`` says in words what they are.
    """
    if not isinstance(value, kinds):
        raise ConfigError(f"{name} is {repr(value)[:60]}", remedy=f"give {wanted}")


def options_or(default: T, given: T | None, name: str = "options") -> T:
    """The options that are given, or else the default ones.

    Raises:
        ConfigError: they are of another type, such as a mapping.
    """
    if given is None:
        return default
    kind = type(default).__name__
    fields: Any = given if isinstance(given, Mapping) else {}
    example = ", ".join(f"{key}={value!r}" for key, value in fields.items()) or "..."
    check_argument(name, given, type(default), f"`{name}={kind}({example})`")
    return given


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number, at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a number that can be compared."""
    return isinstance(value, int | float) and not isinstance(value, bool)
