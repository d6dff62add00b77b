"""What is wrong with a command line, in our words: values that an option does not take, and options of mergekit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import typer

from mergekit_ray.cli.mergekit_options import here
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.spelling import nearest

E = TypeVar("E", bound=StrEnum)


def whole(least: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers.

    Args:
        least: the smallest that is taken.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"expected a whole number, found {text!r}") from None
        if least is not None and value < least:
            raise typer.BadParameter(f"expected at least {least}, found {value}")
        return value

    return parse


def number(text: str) -> float:
    """A parser of numbers."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, found {text!r}") from None


def one_of(kind: type[E]) -> Callable[[str], E]:
    """A parser of the words of an enumeration."""

    def parse(text: str) -> E:
        words = [each.value for each in kind]
        if text not in words:
            wanted = f"{', '.join(words[:-1])} or {words[-1]}"
            raise typer.BadParameter(f"expected {wanted}, found {text!r}{nearest(text, words)}")
        return kind(text)

    return parse


def wrong_arguments(error: Any, command: str, given: Sequence[str]) -> ConfigError:
    """What click says of arguments, in our words.

    Args:
        error: its `UsageError`.
        command: as the user calls it.
        given: its arguments.
    """
    remedy = f"see `{command} --help`"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option:
        # click takes `-nvn` for three options of one letter.
        for name in (option, *(word for word in given if word.startswith(option) and option[1:2] != "-")):
            known = here(name, command)
            if known is not None:
                return ConfigError(f"{name} is an option of mergekit", remedy=f"here: {known}")
        return ConfigError(f"no such option: {option}{nearest(option, error.possibilities or ())}", remedy=remedy)
    parameter = getattr(error, "param", None)
    said = getattr(error, "message", None)
    if parameter is not None and said:
        name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.human_readable_name
        return ConfigError(f"{name}: {said}", remedy=remedy)
    message = re.sub(r"^Got unexpected extra .* \((.*)\)$", r"too many arguments: \1", str(error.format_message()))
    message = message.removesuffix(".").replace(". Did you mean", "; did you mean")
    return ConfigError(message[:1].lower() + message[1:], remedy=remedy)
