"""YAML text -> plain data, and the line every part of it stands on.

Reads parser events itself instead of composing nodes: so depth, size and alias expansion are bounded, duplicate keys
are seen, and every value keeps its place. Plain scalars mean what YAML 1.1 says (mergekit reads recipes that way),
except for numbers: ``1e-3`` and ``.5e1`` are numbers, while ``010`` and ``1:30`` stay text instead of octal 8 and
sexagesimal 90.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from mergekit_ray.core.errors import ConfigError, Problem

YamlPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indices from the document down to a value."""

MAX_TEXT_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_NODES = 200_000
"""Values in the document after aliases are expanded. Real recipes have a few thousand."""

STAGES = "stages"
"""The key of a recipe that lists recipes."""

_TAG = "tag:yaml.org,2002:"
_TRUE = frozenset({"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"})
_FALSE = frozenset({"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"})
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_RADIX = re.compile(r"[-+]?0(x[0-9a-fA-F_]*[0-9a-fA-F]|b[01_]*[01]|o[0-7_]*[0-7])")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_SIMPLE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MAX_DIGITS = 400
_OPENED = {"flow sequence": "[]", "flow mapping": "{}"}
"""In the words of YAML's parser: what a bracket opens."""


@dataclass
class Document:
    """The data of one recipe and where each part of it came from.

    Attributes:
        data: dicts with string keys, lists, and scalars.
        file: the file as the user named it, ``<text>``, or empty for data that never was text.
        positions: (line, column), both from 1, of each key and list item, by its path. Values reached through an alias
            or a merge key stand where they are written.
        problems: what is wrong with the text itself but does not keep it from being read (duplicate keys).
        text: as it was read; None for data that never was text.
    """

    data: Any
    file: str = ""
    positions: Mapping[YamlPath, tuple[int, int]] = field(default_factory=dict)
    problems: list[tuple[YamlPath, tuple[int, int], str, str]] = field(default_factory=list)
    text: str | None = None

    def position(self, path: YamlPath) -> tuple[int, int] | None:
        """Where ``path`` stands, or else the nearest thing around it; None for data without text."""
        for length in range(len(path), -1, -1):
            found = self.positions.get(path[:length])
            if found is not None:
                return found
        return None

    def where(self, position: tuple[int, int] | None) -> str:
        """``file:line``."""
        return f"{self.file}:{position[0]}" if position else self.file


def format_path(path: YamlPath) -> str:
    """A path as a user reads it: ``models[1].parameters.weight``, ``modules["a.b"].slices``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _SIMPLE_KEY.fullmatch(part):
            text += f".{part}" if text else part
        else:
            shown = part if len(part) <= 60 else part[:57] + "..."
            text += f'["{shown}"]'
    return text


def read_yaml(text: str, file: str = "<text>") -> Document:
    """Read YAML. Several documents, which ``---`` parts, are a list called `STAGES`.

    Args:
        text: the whole text.
        file: what to call it in messages.

    Raises:
        ConfigError: a syntax error, a tag, a cycle, or one of the limits above; with the line.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise too_large(file)
    try:
        root = _Builder().build(text)
        expander = _Expander()
        data = expander.expand(root, (), 0)
    except _Unreadable as error:
        raise _failure(file, error.line, error.what, error.hint) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(file, text, error) from None
    except yaml.reader.ReaderError:
        bad = _UNPRINTABLE.search(text)
        line = text.count("\n", 0, bad.start()) + 1 if bad else None
        what = f"not valid YAML: the character {bad[0] if bad else ''!r} is not allowed"
        raise _failure(file, line, what, "save the recipe as UTF-8 text") from None
    except UnicodeError:
        raise _failure(file, None, "not valid Unicode text", "save the recipe as UTF-8 text") from None
    return Document(data, file, expander.positions, expander.problems, text)


def _syntax_error(file: str, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    """What the parser says, at a line that the file has (at the end of the text it counts one too many)."""
    lines = text.splitlines() or [""]
    mark = error.problem_mark or error.context_mark
    line = min(mark.line + 1, len(lines)) if mark else None
    what = f"not valid YAML: {error.problem or error.context or 'syntax error'}"
    began = error.context_mark.line + 1 if error.context_mark else None
    opened = next((each for context, each in _OPENED.items() if context in (error.context or "")), None)
    if opened is not None and began is not None and "expected" in (error.problem or ""):
        what = f"not valid YAML: the {opened[0]!r} is not closed, or a comma is missing after it"
        return _failure(file, began, what, f"check the brackets: write {opened[1]!r} where it ends")
    if error.context and error.problem:
        what += f" ({error.context}{f' that began at line {began}' if began and line and began < line else ''})"
    hint = "check the indentation, quotes and brackets just above"
    if line and re.match(r" *\t", lines[line - 1]):
        hint = "indent with spaces: YAML allows no tabs there"
    return _failure(file, line, what, hint)


def too_large(file: str) -> ConfigError:
    """The error for a recipe above `MAX_TEXT_BYTES`."""
    what = f"larger than {MAX_TEXT_BYTES >> 20} MiB, too large for a recipe"
    return _failure(file, None, what, "name the recipe, not a checkpoint's file")


def _failure(file: str, line: int | None, what: str, hint: str) -> ConfigError:
    where = f"{file}:{line}" if line else file
    return ConfigError("the recipe cannot be read", where=file, problems=[Problem(where, "", what, hint)])


class _Unreadable(Exception):  # noqa: N818 - becomes a ConfigError as soon as the file's name is known
    def __init__(self, line: int | None, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.line = line
        self.what = what
        self.hint = hint


@dataclass(slots=True, eq=False)
class _Scalar:
    position: tuple[int, int]
    text: str
    plain: bool
    tag: str | None


@dataclass(slots=True, eq=False)
class _Sequence:
    position: tuple[int, int]
    items: list[_Node] = field(default_factory=list)
    closed: bool = False


@dataclass(slots=True, eq=False)
class _Mapping:
    position: tuple[int, int]
    flat: list[_Node] = field(default_factory=list)  # key, value, key, value, ...
    closed: bool = False


_Node: TypeAlias = _Scalar | _Sequence | _Mapping


class _Builder:
    """Parser events -> nodes; aliases point at the node they name."""

    def __init__(self) -> None:
        self._anchors: dict[str, _Node] = {}
        self._open: list[_Sequence | _Mapping] = []
        self._roots: list[_Node] = []

    def build(self, text: str) -> _Node:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's parser where PyYAML was built with it
        for event in yaml.parse(text, Loader=loader):
            self._take(event)
        roots = [root for root in self._roots if not _is_empty(root)] or self._roots
        if not roots:
            raise _Unreadable(None, "the recipe is empty", "write a recipe: `merge_method` and `models`, or `experts`")
        first = roots[0]
        if len(roots) == 1:
            return first
        listed = _Sequence(first.position, roots, closed=True)
        return _Mapping(first.position, [_Scalar(first.position, STAGES, True, None), listed], closed=True)

    def _take(self, event: yaml.Event) -> None:
        mark = event.start_mark
        position = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        if isinstance(event, yaml.DocumentStartEvent):
            self._anchors = {}
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._alias(event.anchor or "", position[0]))
        elif isinstance(event, yaml.ScalarEvent):
            plain = bool(event.implicit[0]) and event.tag is None
            self._enter(event.anchor, _Scalar(position, event.value, plain, _tag(event.tag, position[0], _SCALAR_TAGS)))
        elif isinstance(event, yaml.SequenceStartEvent):
            _tag(event.tag, position[0], ("seq",))
            self._begin(event.anchor, _Sequence(position))
        elif isinstance(event, yaml.MappingStartEvent):
            _tag(event.tag, position[0], ("map",))
            self._begin(event.anchor, _Mapping(position))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop().closed = True

    def _alias(self, anchor: str, line: int) -> _Node:
        node = self._anchors.get(anchor)
        if node is None:
            raise _Unreadable(
                line, f"*{anchor} refers to no anchor", f"write &{anchor} before the value it should repeat"
            )
        if not isinstance(node, _Scalar) and not node.closed:
            raise _Unreadable(line, f"*{anchor} lies inside the value that &{anchor} names, so it never ends")
        return node

    def _begin(self, anchor: str | None, node: _Sequence | _Mapping) -> None:
        self._enter(anchor, node)
        self._open.append(node)
        if len(self._open) > MAX_DEPTH:
            raise _too_deep(node.position[0])

    def _enter(self, anchor: str | None, node: _Node) -> None:
        if anchor is not None:
            self._anchors[anchor] = node
        self._add(node)

    def _add(self, node: _Node) -> None:
        if not self._open:
            self._roots.append(node)
        elif isinstance(top := self._open[-1], _Sequence):
            top.items.append(node)
        else:
            top.flat.append(node)


def _is_empty(node: _Node) -> bool:
    """Whether a document says nothing, as what follows a last ``---``."""
    return isinstance(node, _Scalar) and node.plain and node.text in _NULL


_SCALAR_TAGS = ("str", "int", "float", "bool", "null")


def _tag(tag: str | None, line: int, accepted: tuple[str, ...]) -> str | None:
    if tag is None:
        return None
    if tag == "!":
        return "str" if "str" in accepted else None
    name = tag.removeprefix(_TAG)
    if name == tag or name not in accepted:
        shown = f"!!{name}" if name != tag else tag
        raise _Unreadable(line, f"the YAML tag {shown[:60]!r} means nothing in a recipe", "remove the tag")
    return name


def _too_deep(line: int) -> _Unreadable:
    return _Unreadable(line, f"nested more than {MAX_DEPTH} deep, too large for a recipe")


@dataclass(slots=True)
class _Entries:
    pairs: dict[str, tuple[tuple[int, int], _Node]]
    duplicates: list[tuple[str, tuple[int, int], tuple[int, int]]]


class _Expander:
    """Nodes -> data, with aliases and merge keys expanded, within a budget of nodes."""

    def __init__(self) -> None:
        self.positions: dict[YamlPath, tuple[int, int]] = {}
        self.problems: list[tuple[YamlPath, tuple[int, int], str, str]] = []
        self._entries: dict[int, _Entries] = {}
        self._reported: set[tuple[int, int]] = set()
        self._num_nodes = 0

    def expand(self, node: _Node, path: YamlPath, depth: int) -> Any:
        self._spend(node.position[0])
        self.positions.setdefault(path, node.position)
        if depth > MAX_DEPTH:
            raise _too_deep(node.position[0])
        if isinstance(node, _Scalar):
            return _construct(node)
        if isinstance(node, _Sequence):
            return [self.expand(item, (*path, i), depth + 1) for i, item in enumerate(node.items)]
        entries = self._entries_of(node, depth)
        for key, first, again in entries.duplicates:
            if again not in self._reported:
                self._reported.add(again)
                what = f"the key {key!r} appears twice; first at line {first[0]}"
                self.problems.append(((*path, key), again, what, "keep one of them"))
        result = {}
        for key, (position, value) in entries.pairs.items():
            self.positions[*path, key] = position
            result[key] = self.expand(value, (*path, key), depth + 1)
        return result

    def _spend(self, line: int) -> None:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise _Unreadable(
                line,
                f"more than {MAX_NODES} values once its aliases are expanded, which no recipe has",
                "write out the aliases that repeat other aliases",
            )

    def _entries_of(self, node: _Mapping, depth: int) -> _Entries:
        """Key -> position and value; own keys win over merged ones, earlier merges over later ones."""
        known = self._entries.get(id(node))
        if known is not None:
            return known
        if depth > MAX_DEPTH:
            raise _too_deep(node.position[0])
        entries = _Entries({}, [])
        merges: list[_Node] = []
        for key, value in zip(node.flat[::2], node.flat[1::2], strict=True):
            if not isinstance(key, _Scalar):
                raise _Unreadable(
                    key.position[0], "a list or mapping stands where a key should", "keys are plain words"
                )
            if key.plain and key.text == "<<":
                merges.append(value)
            elif key.text in entries.pairs:
                entries.duplicates.append((key.text, entries.pairs[key.text][0], key.position))
            else:
                entries.pairs[key.text] = (key.position, value)
        for merged in (mapping for merge in merges for mapping in _mergeable(merge)):
            for text, entry in self._entries_of(merged, depth + 1).pairs.items():
                self._spend(merged.position[0])
                entries.pairs.setdefault(text, entry)
        self._entries[id(node)] = entries
        return entries


def _mergeable(node: _Node) -> Iterator[_Mapping]:
    for item in node.items if isinstance(node, _Sequence) else [node]:
        if not isinstance(item, _Mapping):
            raise _Unreadable(item.position[0], "<< merges mappings, found something else", "write `<<: *anchor`")
        yield item


def _construct(node: _Scalar) -> Any:
    if node.tag == "str" or (node.tag is None and not node.plain):
        return node.text
    value = parse_plain(node.text)
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),)}
    if node.tag is not None and not isinstance(value, kinds[node.tag]):
        raise _Unreadable(
            node.position[0], f"{node.text[:60]!r} is not what its tag !!{node.tag} says", "remove the tag"
        )
    return float(value) if node.tag == "float" and isinstance(value, int) else value


def parse_plain(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if len(text) > _MAX_DIGITS:  # int() of thousands of digits is slow or refused, and such text is no number
        return text
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _RADIX.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    return float(text.replace("_", "")) if _NUMBER.fullmatch(text) else text
