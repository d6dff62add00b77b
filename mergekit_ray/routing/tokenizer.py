"""The tokenizer beside a model: its own file where that says everything, transformers' reading of it otherwise.

Many model families have a class in transformers that changes what ``tokenizer.json`` says. Where the class is the one
that takes the file as it is, the tokenizers library alone gives the same tokens without transformers, whose import
takes longer than to make the routers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from mergekit_ray.checkpoint.opening import Checkpoint

_AS_IT_IS: Final = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes of transformers that read ``tokenizer.json`` and change nothing: before version 5, and since."""

_CHANGES: Final = ("add_prefix_space", "split_special_tokens", "added_tokens_decoder", "extra_special_tokens")
"""Settings of ``tokenizer_config.json`` that change what becomes of a prompt, or may."""

_MAX_FILE_BYTES: Final = 256 << 20


class Tokenizer(Protocol):
    """Makes token ids of a prompt.

    Attributes:
        bos: id of the beginning-of-sequence token, None if there is none.
    """

    @property
    def bos(self) -> int | None: ...  # noqa: D102 - see the class

    def ids(self, prompt: str) -> Sequence[int]:
        """Of a prompt, without special tokens beside those it spells out."""
        ...


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside a model, wherever that is; only its own (small) files are fetched.

    Raises:
        ModelError: there is none, or it cannot be loaded.
        PlanError: transformers is needed and not installed.
    """
    found = plain_tokenizer(checkpoint)
    if found is not None:
        return found
    from mergekit_ray.routing import skeleton  # noqa: PLC0415 - transformers is slow to import

    return _ByTransformers(skeleton.transformers_tokenizer(checkpoint))


class _ByTransformers:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id

    def ids(self, prompt: str) -> Sequence[int]:
        return [int(token) for token in self._tokenizer(prompt, add_special_tokens=False)["input_ids"]]


class _Plain:
    def __init__(self, tokenizer: Any, bos: int | None) -> None:
        self._tokenizer = tokenizer
        self.bos = bos

    def ids(self, prompt: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        return ids


def plain_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer as its file has it; None if transformers would, or might, make something else of it."""
    names = {file.name for file in checkpoint.side_files}
    if not {"tokenizer.json", "tokenizer_config.json"} <= names:
        return None
    if names & {"special_tokens_map.json", "added_tokens.json"}:
        return None  # of older versions, which say some things twice
    try:
        config = json.loads(_read(checkpoint, "tokenizer_config.json"))
        file = _read(checkpoint, "tokenizer.json")
        described = json.loads(file)
    except ValueError:
        return None  # transformers says what is wrong
    if not isinstance(config, Mapping) or not isinstance(described, Mapping):
        return None
    if config.get("tokenizer_class") not in _AS_IT_IS or any(config.get(name) for name in _CHANGES):
        return None
    special = [value for name, value in config.items() if name.endswith("_token") and value is not None]
    marked = {
        token.get("content"): token.get("id")
        for token in described.get("added_tokens") or ()
        if isinstance(token, Mapping) and token.get("special")
    }
    if not all(isinstance(token, str) and token in marked for token in special):
        return None  # transformers would add them
    try:
        import tokenizers  # noqa: PLC0415 - with transformers, an optional dependency

        tokenizer = tokenizers.Tokenizer.from_str(file.decode())
    except Exception:  # noqa: BLE001 - what is wrong is said by transformers, or that it is missing
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = config.get("bos_token")
    return _Plain(tokenizer, None if bos is None else tokenizer.token_to_id(bos))


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    return checkpoint.source.read(name, max_bytes=_MAX_FILE_BYTES)
