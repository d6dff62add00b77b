"""The files of a tokenizer: where they lie, and their content, seen to be of the right form.

A stranger made them: what they say is checked before anything is computed from it, so that no number in them decides
how much memory is taken, and every message names the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES, is_tokenizer_file
from mergekit_ray.checkpoint.strict_json import parse_config, parse_object
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.storage.protocols import FileStat, Source

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
SPECIAL_MAP: Final = "special_tokens_map.json"
ADDED: Final = "added_tokens.json"
GENERATION: Final = "generation_config.json"
SETTINGS: Final = (CONFIG, SPECIAL_MAP, ADDED, GENERATION)

KINDS: Final = ("BPE", "WordPiece", "Unigram", "WordLevel")
MAX_IDS: Final = 1 << 24
"""More than any vocabulary has; an id from here on is an error in the file."""

FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Of an added token; each is true or false."""

REMEDY: Final = "download or copy the tokenizer's files again, or load it with transformers and save it again"
_MOST_SCORE: Final = 1e30
"""Scores are logarithms of probabilities, or ranks."""

_MAX_DEPTH: Final = 100
_MAX_SHOWN: Final = 40


def shown(token: str) -> str:
    """A token for a message: quoted, on one line, not endless."""
    return repr(token) if len(token) <= _MAX_SHOWN else f"{token[:_MAX_SHOWN]!r}..."


def side_files(checkpoint: Checkpoint) -> dict[str, tuple[Source, FileStat]]:
    """By name, where each file beside the weights lies. What an adapter brings takes the place of the base's."""
    beside = [checkpoint, *([checkpoint.adapter.checkpoint] if isinstance(checkpoint, AdaptedCheckpoint) else [])]
    return {file.name: (each.source, file) for each in beside for file in each.side_files}


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, tuple[Source, FileStat]]:
    """By name, where each of a tokenizer's files lies, and ``generation_config.json``."""
    return {
        name: place for name, place in side_files(checkpoint).items() if is_tokenizer_file(name) or name == GENERATION
    }


def read(source: Source, file: FileStat) -> bytes:
    """A whole file.

    Raises:
        ModelError: it is too large.
        CheckpointError, StorageError: it could not be read.
    """
    if file.num_bytes > MAX_SIDE_FILE_BYTES:
        fail(
            f"has {format_bytes(file.num_bytes)}; a tokenizer's file has at most {format_bytes(MAX_SIDE_FILE_BYTES)}",
            f"{source.uri}/{file.name}",
        )
    return source.read(file.name, max_bytes=MAX_SIDE_FILE_BYTES)


def content(source: Source, file: FileStat) -> dict[str, Any]:
    """The object in a JSON file, of the form that its name asks for.

    Raises:
        ModelError: it is too large, no such JSON, or not of that form.
        CheckpointError, StorageError: it could not be read.
    """
    where, data = f"{source.uri}/{file.name}", read(source, file)
    try:
        found = parse_object(data, where, "file") if file.name == TOKENIZER else parse_config(data, where, "file")[0]
    except CheckpointError as error:
        raise ModelError(error.what, where=where, remedy=REMEDY) from error
    checked(file.name, found, where)
    return found


def checked(name: str, found: Mapping[str, Any], where: str) -> None:
    """See that a file's content is of the form that its name asks for.

    Raises:
        ModelError: it is not.
    """
    match name:
        case "tokenizer.json":
            _check_tokenizer(found, where)
        case "added_tokens.json":
            _check_ids(found, where, "the file")
        case _:
            _check_depth(found, where)
    if name == CONFIG:
        _check_decoder(found.get("added_tokens_decoder"), where)


def fail(what: str, where: str) -> NoReturn:
    """Say what is wrong with a file.

    Raises:
        ModelError: always.
    """
    raise ModelError(what, where=where, remedy=REMEDY)


def kind_of(model: Mapping[str, Any]) -> str | None:
    """What kind of model it is. Files of old versions do not say so, but show it."""
    if "type" in model:
        return model["type"] if isinstance(model["type"], str) else None
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _check_tokenizer(found: Mapping[str, Any], where: str) -> None:
    model = found.get("model")
    if not isinstance(model, Mapping):
        fail("there is no `model` with a vocabulary", where)
    kind = kind_of(model)
    if kind not in KINDS:
        fail(f"a tokenizer of the kind {shown(str(model.get('type')))} is not known; known: {', '.join(KINDS)}", where)
    vocabulary = model.get("vocab")
    if kind == "Unigram":
        _check_pieces(vocabulary, model.get("unk_id"), where)
    else:
        _check_ids(vocabulary, where, "`vocab`")
    if kind == "BPE":
        _check_merges(model.get("merges"), where)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if not isinstance(model.get(name), str | None):
            fail(f"`{name}` is not a text", where)
    rest = {**found, "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")}}
    _check_depth(rest, where)
    added = found.get("added_tokens")
    if not isinstance(added, list | None):
        fail("`added_tokens` is not a list", where)
    for token in added or ():
        if not isinstance(token, Mapping):
            fail("`added_tokens` holds something that is not an added token", where)
        _check_added(token, token.get("id"), where)


def _check_ids(table: Any, where: str, what: str) -> None:
    """See that a table gives each token an id of its own."""
    if not isinstance(table, Mapping):
        fail(f"{what} is not a table of tokens and ids", where)
    if table and (
        set(map(type, table.values())) != {int} or not 0 <= min(table.values()) <= max(table.values()) < MAX_IDS
    ):
        for token, number in table.items():
            _check_id(token, number, where)
    tokens: dict[int, str] = dict(zip(table.values(), table.keys(), strict=True))
    if len(tokens) != len(table):
        token = next(token for token, number in table.items() if tokens[number] != token)
        fail(f"{shown(token)} and {shown(tokens[table[token]])} have the same id, {table[token]}", where)


def _check_id(token: str, number: object, where: str) -> None:
    if type(number) is not int:
        fail(f"the id of {shown(token)} is not a whole number", where)
    if not 0 <= number < MAX_IDS:
        fail(f"{shown(token)} has the id {number}; ids are from 0 to {MAX_IDS - 1}", where)


def _check_pieces(pieces: Any, unknown: object, where: str) -> None:
    if not isinstance(pieces, list) or not pieces:
        fail("`vocab` is not a list of pieces and their scores", where)
    if len(pieces) > MAX_IDS:
        fail(f"there are {len(pieces)} pieces; at most {MAX_IDS} are read", where)
    for number, piece in enumerate(pieces):
        match piece:
            case [str(), int() | float() as score] if not isinstance(score, bool) and abs(score) < _MOST_SCORE:
                pass
            case _:
                fail(f"the piece with the id {number} is not a text with a score", where)
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(pieces)):
        fail("`unk_id` is not the id of a piece", where)


def _check_merges(merges: Any, where: str) -> None:
    if not isinstance(merges, list):
        fail("there is no list of merges", where)
    if set(map(type, merges)) <= {str} and all(merge.count(" ") == 1 for merge in merges):
        return
    if set(map(type, merges)) == {list} and all(
        len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str) for merge in merges
    ):
        return
    fail("`merges` holds something that is not two tokens", where)


def _check_added(token: Mapping[str, Any], number: object, where: str) -> None:
    if not isinstance(token.get("content"), str):
        fail("an added token has no `content`", where)
    _check_id(token["content"], number, where)
    for flag in FLAGS:
        if not isinstance(token.get(flag, False), bool):
            fail(f"`{flag}` of the added token {shown(token['content'])} is neither true nor false", where)


def _check_decoder(decoder: Any, where: str) -> None:
    if decoder is None:
        return
    if not isinstance(decoder, Mapping):
        fail("`added_tokens_decoder` is not a table of ids and tokens", where)
    for number, token in decoder.items():
        if not isinstance(token, Mapping):
            fail("`added_tokens_decoder` holds something that is not an added token", where)
        is_number = number.isascii() and number.isdecimal() and len(number) <= len(str(MAX_IDS))
        _check_added(token, int(number) if is_number else number, where)


def _check_depth(value: Mapping[str, Any], where: str) -> None:
    level: Sequence[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return
    fail("it is nested too deeply", where)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
