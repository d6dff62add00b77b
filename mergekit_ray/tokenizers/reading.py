"""A model's tokenizer as data: every token with its id, as the files say and as transformers numbers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import is_vocabulary_file
from mergekit_ray.tokenizers.converting import converted
from mergekit_ray.tokenizers.files import (
    ADDED,
    CONFIG,
    FLAGS,
    SETTINGS,
    SPECIAL_MAP,
    TOKENIZER,
    checked,
    content,
    fail,
    kind_of,
    shown,
    tokenizer_files,
)

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings that name a special token, in the order in which transformers adds those that the vocabulary lacks."""

_EXTRA: Final = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer. What it holds is not to be changed.

    Attributes:
        reference: the model, for messages.
        kind: ``BPE``, ``WordPiece``, ``Unigram`` or ``WordLevel``.
        data: content of ``tokenizer.json``.
        settings: content, by file name, of ``tokenizer_config.json``, ``special_tokens_map.json``,
            ``added_tokens.json`` and ``generation_config.json``, as far as they are there.
    """

    reference: str
    kind: str
    data: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Ids of the model's own tokens, without those that are only added."""
        found = self.data["model"]["vocab"]
        return {piece: number for number, (piece, _) in enumerate(found)} if self.kind == "Unigram" else found

    @cached_property
    def added(self) -> Mapping[str, Mapping[str, Any]]:
        """The added tokens in the order of their ids: ``id``, ``content`` and flags, by content.

        As transformers has them once it has loaded the files: those of ``tokenizer.json``, then those that only the
        settings name.
        """
        found: dict[str, dict[str, Any]] = {}
        number = len(self.data["model"]["vocab"])
        for token in _added(self.data, self.settings):
            text = token["content"]
            if not text:
                continue
            if text not in found:
                own = self.vocabulary.get(text)
                found[text] = {"id": number if own is None else own, "content": text, **dict.fromkeys(FLAGS, False)}
                number += own is None
            found[text] |= token
        return dict(sorted(found.items(), key=lambda item: item[1]["id"]))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of every token: of the model's vocabulary and the added ones."""
        return {**self.vocabulary, **{text: token["id"] for text, token in self.added.items()}}

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Ids of the special tokens that the settings name: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``."""
        named = special_tokens(self.settings)
        return {f"{key}_id": self.ids[token["content"]] for key, token in named.items() if token["content"] in self.ids}

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return {number: token for token, number in self.ids.items()}

    def names(self) -> Mapping[int, str]:
        """Every token, by id."""
        return self._names


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer beside a model; None if it has none. Only its own files are read.

    One that comes without ``tokenizer.json`` (``vocab.json`` and ``merges.txt``, or a sentencepiece model) is converted
    by transformers, which is imported only then.

    Raises:
        ModelError: a file is damaged or too large, of an unknown kind, or gives ids that cannot be; files contradict
            each other; or transformers cannot convert it. It names the file.
        PlanError: transformers is needed and not installed.
        CheckpointError, StorageError: a file could not be read.
    """
    files = tokenizer_files(checkpoint)
    if not any(map(is_vocabulary_file, files)):
        return None
    settings: dict[str, Mapping[str, Any]] = {name: content(*files[name]) for name in SETTINGS if name in files}
    places = {name: f"{source.uri}/{name}" for name, (source, _) in files.items()}
    if TOKENIZER in files:
        data = content(*files[TOKENIZER])
    else:
        (data, special), places[TOKENIZER] = converted(checkpoint), checkpoint.reference
        settings[CONFIG] = {**special, **settings.get(CONFIG, {})}
        checked(TOKENIZER, data, checkpoint.reference)
    tokenizer = Tokenizer(checkpoint.reference, str(kind_of(data["model"])), data, settings)
    _check_agreement(tokenizer, places)
    return tokenizer


def special_tokens(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The added token that each setting names: ``{"bos_token": {"content": "<s>"}}``, with flags if it has them."""
    named = {}
    for name in (CONFIG, SPECIAL_MAP):
        if name == SPECIAL_MAP and _has_decoder(settings):
            continue  # as transformers does
        for key, value in settings.get(name, {}).items():
            table = value if key in _EXTRA and isinstance(value, Mapping) else {key: value}
            for each, named_so in table.items():
                if each.endswith("_token") and (token := _token(named_so)) is not None:
                    named[each] = token
    return {key: named[key] for key in (*_NAMED, *named) if key in named}


def named_texts(settings: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """All special tokens that the settings name, by whatever name or none."""
    return {token["content"] for token in (*special_tokens(settings).values(), *_extra(settings))}


def _added(data: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Added tokens in the order in which they get ids, some twice; what is said later of one counts."""
    for token in data.get("added_tokens") or ():
        yield _flags(token)
    if _has_decoder(settings):
        decoder = settings[CONFIG]["added_tokens_decoder"]
        for _, token in sorted((int(number), token) for number, token in decoder.items()):
            yield _flags(token)
    named = special_tokens(settings)
    special = {token["content"] for token in named.values()}
    if not _has_decoder(settings):
        in_file = {token["content"] for token in data.get("added_tokens") or ()}
        for text, _ in sorted(settings.get(ADDED, {}).items(), key=lambda item: item[1]):
            if text not in in_file:
                yield {"content": text, "normalized": text not in special, "special": text in special}
    for token in (*named.values(), *_extra(settings)):
        yield {**_flags(token), "special": True}


def _extra(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Special tokens without a name of their own."""
    for name in (CONFIG, SPECIAL_MAP):
        if name == SPECIAL_MAP and _has_decoder(settings):
            continue
        for key in _EXTRA:
            value = settings.get(name, {}).get(key)
            values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            yield from filter(None, map(_token, values))


def _token(value: Any) -> Mapping[str, Any] | None:
    """An added token as the settings write it: a text, or an object with flags."""
    if isinstance(value, str):
        return {"content": value}
    return value if isinstance(value, Mapping) and isinstance(value.get("content"), str) else None


def _flags(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": token["content"], **{flag: token[flag] for flag in FLAGS if isinstance(token.get(flag), bool)}}


def _has_decoder(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether ``tokenizer_config.json`` lists the added tokens; transformers then reads no older file."""
    return isinstance(settings.get(CONFIG, {}).get("added_tokens_decoder"), Mapping)


def _check_agreement(tokenizer: Tokenizer, places: Mapping[str, str]) -> None:
    """See that each file gives a token the id that it has once the tokenizer is loaded, and no two tokens one id."""
    said: list[tuple[str, str, int]] = []
    said.extend((TOKENIZER, token["content"], token["id"]) for token in tokenizer.data.get("added_tokens") or ())
    if _has_decoder(tokenizer.settings):
        decoder = tokenizer.settings[CONFIG]["added_tokens_decoder"]
        said.extend((CONFIG, token["content"], int(number)) for number, token in decoder.items())
    said.extend((ADDED, text, number) for text, number in tokenizer.settings.get(ADDED, {}).items())
    for name, text, number in said:
        loaded = tokenizer.ids.get(text, number)
        if text and loaded != number:
            fail(f"gives the token {shown(text)} the id {number}, but it is loaded with the id {loaded}", places[name])
    names = tokenizer.names()
    if len(names) != len(tokenizer.ids):
        text, number = next((text, number) for text, number in tokenizer.ids.items() if names[number] != text)
        fail(f"{shown(text)} and {shown(names[number])} are both loaded with the id {number}", places[TOKENIZER])
