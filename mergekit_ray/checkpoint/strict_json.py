"""JSON as checkpoint files must hold it: UTF-8, one object, no key twice, no NaN."""

from __future__ import annotations

import json
from typing import Any

from mergekit_ray.core.errors import CheckpointError


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
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the {what} is not UTF-8 (byte {error.start})", where=where) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"the {what} is not valid JSON: {reason}", where=where) from None
    if b"\\ud" in data.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise CheckpointError(f"the {what} holds {half!r}, which is not valid Unicode", where=where) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"the {what} is not a JSON object", where=where)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")
