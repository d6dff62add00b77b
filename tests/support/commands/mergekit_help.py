"""What mergekit's commands say of their options, and the rows of our page on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mergekit_ray.cli.mergekit_options import Option


@dataclass(frozen=True)
class Told:
    """An option as a help text has it: its spellings, those that turn it off, and what its value is called."""

    names: frozenset[str]
    off: frozenset[str]
    takes: bool


def options_told(text: str) -> set[Told]:
    """The options of a help text that click wrote, but for `--help`."""
    found = set()
    for line in text.splitlines():
        # The text of an option is two spaces further on, or below.
        match = re.match(r"  (-\S.*?)(?:  .*)?$", line)
        if match is None or "--help" in match[1]:
            continue
        on, _, off = match[1].partition(" / ")
        spellings = [re.findall(r"(?:^|[\s,])(--?[a-zA-Z][\w-]*)", part) for part in (on, off)]
        found.add(Told(frozenset(spellings[0]), frozenset(spellings[1]), takes=bool(re.search(r"\s[A-Z\[]", on))))
    return found


def declared(options: Iterable[Option]) -> set[Told]:
    """The options of one of our tables."""
    return {Told(frozenset(each.names), frozenset(each.off), takes=bool(each.takes)) for each in options}


def rows(options: Iterable[Option]) -> list[str]:
    """Rows of a table in docs/from-mergekit.md: options that are the same here share one."""
    found: dict[str, list[str]] = {}
    for option in options:
        found.setdefault(option.here, []).extend(f"`{name}`" for name in option.names)
        if option.off_here:
            found.setdefault(option.off_here, []).extend(f"`{name}`" for name in option.off)
    return [f"| {', '.join(names)} | {here} |" for here, names in found.items()]
