"""A tokenizer's files, and what a config says of its ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from mergekit_ray.checkpoint.token_ids import LISTS, names_tokens, renumbered
from mergekit_ray.core.errors import PlanError
from mergekit_ray.tokenizers.files import CONFIG, GENERATION, SPECIAL_MAP, TOKENIZER, shown
from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.uniting import settled

_TEMPLATE: Final = "chat_template.jinja"


def files_of(tokenizer: Tokenizer, *, chat_template: str | None = None) -> dict[str, str]:
    """The tokenizer's files by name: all that is needed to load it, and the same text every time.

    These are ``tokenizer.json``; ``tokenizer_config.json``, ``special_tokens_map.json`` and ``generation_config.json``
    if the tokenizer has them. ``vocab.json``, ``merges.txt`` and ``added_tokens.json`` would say the same again.

    Args:
        tokenizer: to be written.
        chat_template: in place of what the settings have; in a file of its own, ``chat_template.jinja``. Without it,
            the template in the settings stays, and template files are the caller's.
    """
    tokenizer = settled(tokenizer)
    found = {name: tokenizer.settings[name] for name in (CONFIG, SPECIAL_MAP, GENERATION) if name in tokenizer.settings}
    if chat_template is not None and "chat_template" in found.get(CONFIG, {}):
        found[CONFIG] = {key: value for key, value in found[CONFIG].items() if key != "chat_template"}
    texts = {name: json.dumps(value, ensure_ascii=False, indent=2) + "\n" for name, value in found.items()}
    # In one line: json indents in Python, which would take longer than all else that is done to a tokenizer.
    whole = {TOKENIZER: json.dumps(tokenizer.data, ensure_ascii=False) + "\n", **texts}
    return whole if chat_template is None else {**whole, _TEMPLATE: chat_template}


def remapped_ids(value: Mapping[str, Any], old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    """A config in which each id names the token that it named before.

    Args:
        value: content of ``config.json`` or ``generation_config.json``; parts of it are searched, too.
        old: whose ids it has.
        new: whose ids it gets. Of a list, tokens that it lacks are left out, and words with such tokens.

    Raises:
        PlanError: it lacks a token that the config names, or all of a list; a token has an id there that was no
            token's; or the config is nested without reason.
    """
    if old.ids == new.ids:
        return dict(value)
    try:
        return _remapped_all(value, old, new)
    except RecursionError:
        raise PlanError(
            "the config is nested too deeply", where=old.reference, remedy="download or copy it again, or correct it"
        ) from None


def _remapped_all(value: Mapping[str, Any], old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    found = {}
    for key, each in value.items():
        if names_tokens(key):
            found[key] = _remapped(key, each, old, new)
        elif key in LISTS:
            found[key] = renumbered(key, each, partial(_number, old=old, new=new))
        else:
            found[key] = _remapped_all(each, old, new) if isinstance(each, Mapping) else each
    return found


def _remapped(key: str, value: Any, old: Tokenizer, new: Tokenizer) -> Any:
    if isinstance(value, Mapping):
        return {inner: _remapped(f"{key}.{inner}", each, old, new) for inner, each in value.items()}
    if isinstance(value, list):
        kept = [each for each in value if _token(each, old) is None or _token(each, old) in new.ids]
        if value and not kept:
            raise _lacking(key, value[0], old, new)
        return [_remapped(key, each, old, new) for each in kept]
    token = _token(value, old)
    if token is None:
        if _token(value, new) is not None:
            raise _taken(key, value, old, new)
        return value
    if token not in new.ids:
        raise _lacking(key, value, old, new)
    return new.ids[token]


def _number(number: int, *, old: Tokenizer, new: Tokenizer) -> int | None:
    """The same token's id. An id that was no token's stays, unless it is another token's now."""
    token = old.names().get(number)
    if token is None:
        return None if number in new.names() else number
    return new.ids.get(token)


def _token(value: Any, tokenizer: Tokenizer) -> str | None:
    """The token of an id; None of anything else, as -1 or the id of a padding row, which stays as it is."""
    return tokenizer.names().get(value) if type(value) is int else None


def _taken(key: str, number: int, old: Tokenizer, new: Tokenizer) -> PlanError:
    token = shown(new.names()[number])
    return PlanError(
        f"{key} is {number}, which is none of its tokens, and would be {token} in the new tokenizer",
        where=old.reference,
        remedy=f"add the token that {key} means to its tokenizer, or correct {key} in the model's config",
    )


def _lacking(key: str, number: int, old: Tokenizer, new: Tokenizer) -> PlanError:
    token = old.names()[number]
    return PlanError(
        f"{key} is {number}, which is {shown(token)}, and the tokenizer of {new.reference} has no such token",
        where=old.reference,
        remedy=f"keep the token: `tokenizer: {{source: union}}`, or {shown(token)} under `tokens`; or correct {key}",
    )
