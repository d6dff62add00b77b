"""The token ids that a model's config and the tokenizer beside it speak of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import CONFIG_NAME

_MAX_FILE_BYTES = 256 << 20
_SPECIAL = ("_token_id", "_token_ids", "_token_index")
"""Endings of the keys that give ids of single tokens: ``eos_token_id``, ``image_token_index``, ..."""


def token_ids(checkpoint: Checkpoint) -> dict[str, set[int]]:
    """Ids by what names them: ``eos_token_id of config.json``, ``tokenizer.json``.

    Read are ``config.json`` (parts of it too), ``generation_config.json`` and the tokenizer's JSON files, where they
    are there. What a file holds in another form than transformers' is passed over, as is a vocabulary that is not JSON
    (sentencepiece's).

    Raises:
        CheckpointError, StorageError: a file could not be read.
    """
    beside = [checkpoint, *([checkpoint.adapter.checkpoint] if isinstance(checkpoint, AdaptedCheckpoint) else [])]
    sources = {file.name: each.source for each in beside for file in each.side_files}

    def content(name: str) -> Any:
        if name not in sources:
            return None
        try:
            return json.loads(sources[name].read(name, max_bytes=_MAX_FILE_BYTES))
        except (ValueError, RecursionError):
            return None

    found: dict[str, set[int]] = {}
    for name, config in ((CONFIG_NAME, checkpoint.config), *((n, content(n)) for n in ("generation_config.json",))):
        for key, value in _special(config):
            found.setdefault(f"{key} of {name}", set()).update(_ids(value))
    found["tokenizer.json"] = set(_of_tokenizer(content("tokenizer.json")))
    found["vocab.json"] = set(_ids(content("vocab.json")))
    found["added_tokens.json"] = set(_ids(content("added_tokens.json")))
    decoder = _get(content("tokenizer_config.json"), "added_tokens_decoder")
    keys = decoder if isinstance(decoder, Mapping) else ()
    found["added_tokens_decoder of tokenizer_config.json"] = {int(key) for key in keys if key.isdecimal()}
    return {what: ids for what, ids in found.items() if ids}


def names_tokens(key: str) -> bool:
    """Whether a key of a config gives ids of single tokens."""
    return key.endswith(_SPECIAL)


LISTS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
)
"""Keys of a generation config that list tokens, or runs of tokens."""


def renumbered(key: str, value: Any, number: Callable[[int], int | None]) -> Any:
    """One of the `LISTS` with other ids. What names a token that has none is left out.

    Args:
        key: which one.
        value: a list: of ids, of lists of ids (of words, perhaps in further lists), of places with ids, or of lists of
            ids with numbers. Anything else stays as it is.
        number: the new id of an id; None if its token is gone.
    """
    if isinstance(value, list) and all(isinstance(each, list) for each in value):
        if key == "forced_decoder_ids":
            pairs = [(each, number(each[1])) for each in value if len(each) == 2 and type(each[1]) is int]
            return [[each[0], new] for each, new in pairs if new is not None]
        if key == "sequence_bias":
            runs = [(renumbered("", each[0], number), each) for each in value if each]
            return [[ids, *each[1:]] for ids, each in runs if len(ids) == len(each[0])]
        words = [(renumbered("", each, number), each) for each in value]
        return [ids for ids, each in words if len(ids) == len(each)]
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        return value
    return [each if each < 0 else new for each in value if each < 0 or (new := number(each)) is not None]


def _special(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of ids, of the parts of a config too."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if names_tokens(key):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _special(value)


def _ids(value: Any) -> list[int]:
    """An id, or those of a list or of a table by token."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def _of_tokenizer(content: Any) -> list[int]:
    """Of a file of the tokenizers library: its model's vocabulary, and the tokens that were added to it."""
    vocabulary = _get(_get(content, "model"), "vocab")
    # Unigram models list their tokens with scores.
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else _ids(vocabulary)
    added = _get(content, "added_tokens")
    return ids + [number for token in added or () for number in _ids(_get(token, "id"))]


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None
