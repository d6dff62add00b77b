"""JSON as checkpoint files must hold it: UTF-8, one object, no key twice, no NaN; and as config.json may hold it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from mergekit_ray.core.errors import CheckpointError

_REMEDY = "download or copy the file again, or correct it"


def parse_object(data: bytes, where: str, what: str) -> dict[str, Any]:
    """The object in ``data``.

    Args:
        data: the file's bytes.
        where: the file, for messages.
        what: what it should hold, for messages ("safetensors header").

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, nested without reason, or a key occurs twice; or a text in
            it is not Unicode: half of a surrogate pair, which no file name and no other file could hold.
    """
    return _parse(data, where, what, _unique, _refuse_constant)


def parse_config(data: bytes, where: str, what: str = "config") -> tuple[dict[str, Any], tuple[str, ...]]:
    """The object in a ``config.json``, read as Python's json and transformers do: with ``Infinity`` and ``NaN``.

    Returns:
        The object, and the keys that occur twice in it or in a part of it: of their values the last counts.

    Raises:
        CheckpointError: see `parse_object`.
    """
    twice: dict[str, None] = {}

    def last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.update(dict.fromkeys(_repeated(pairs)))
        return dict(pairs)

    return _parse(data, where, what, last, None), tuple(twice)


def _parse(
    data: bytes,
    where: str,
    what: str,
    of_pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]],
    of_constant: Callable[[str], Any] | None,
) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=of_pairs, parse_constant=of_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the {what} is not UTF-8 (byte {error.start})", where=where, remedy=_REMEDY) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"the {what} is not valid JSON: {reason}", where=where, remedy=_REMEDY) from None
    if b"\\ud" in data.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise CheckpointError(
                f"the {what} holds {half!r}, which is not valid Unicode", where=where, remedy=_REMEDY
            ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"the {what} is not a JSON object", where=where, remedy=_REMEDY)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {_repeated(pairs)[0]!r} occurs twice")
    return found


def _repeated(pairs: list[tuple[str, Any]]) -> list[str]:
    """The keys that occur more than once."""
    return [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")
