"""The tokenizer beside a model: read from ``tokenizer.json`` if that says everything, by transformers otherwise.

Many model families have a class in transformers that changes what ``tokenizer.json`` says. If the class uses the file
unchanged, the tokenizers library gives the same tokens without transformers, whose import takes longer than making the
routers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import MergekitRayError, ModelError

_AS_IT_IS: Final = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes of transformers that read ``tokenizer.json`` and change nothing: before version 5, and since."""

_CHANGES: Final = ("add_prefix_space", "split_special_tokens", "added_tokens_decoder", "extra_special_tokens")
"""Settings of ``tokenizer_config.json`` that change, or may change, a prompt's tokens."""

_MAX_FILE_BYTES: Final = 256 << 20

_JSON_FILES: Final = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
)
_MAX_SHOWN: Final = 300


class Tokenizer(Protocol):
    """Makes token ids of a prompt.

    Attributes:
        bos: id of the beginning-of-sequence token, None if there is none.
    """

    @property
    def bos(self) -> int | None: ...  # noqa: D102 - see the class

    def ids(self, prompt: str) -> Sequence[int]:
        """Of a prompt, with only the special tokens that it spells out."""
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

    with blamed_on_files(checkpoint, "transformers cannot load the tokenizer"):
        return _ByTransformers(skeleton.transformers_tokenizer(checkpoint))


@contextlib.contextmanager
def blamed_on_files(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Report any error of a library that reads a tokenizer's files as a fault of these files, which are a stranger's.

    Raises:
        ModelError: saying ``what`` cannot be done, and the file if one of them is damaged.
    """
    try:
        yield
    except (MergekitRayError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises whatever it meets, tokenizers panics, which are no Exceptions
        names = sorted(file.name for file in checkpoint.side_files if file.name in _JSON_FILES)
        damaged = next(filter(None, (_damage(checkpoint, name) for name in names)), None)
        where, why = damaged or (checkpoint.reference, f"{str(error) or type(error).__name__:.{_MAX_SHOWN}}")
        raise ModelError(
            f"{what}: {why}",
            where=where,
            remedy=f"check the tokenizer's files beside the base model's weights ({', '.join(names) or 'no JSON'}), or "
            "download them again",
        ) from error


def _damage(checkpoint: Checkpoint, name: str) -> tuple[str, str] | None:
    """Where and why, if a file holds no JSON object."""
    where = f"{checkpoint.source.uri}/{name}"
    try:
        found = json.loads(_read(checkpoint, name))
    except RecursionError:
        return where, "it is nested too deeply"
    except ValueError as error:
        return where, f"it is not valid JSON: {error!s:.{_MAX_SHOWN}}"
    return None if isinstance(found, dict) else (where, "it is not a JSON object")


class _ByTransformers:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

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
    config, file = (_read(checkpoint, name) for name in ("tokenizer_config.json", "tokenizer.json"))
    try:
        return _plain(json.loads(config), json.loads(file), file)
    except BaseException as error:  # also a panic of Rust's
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None  # transformers says what is wrong, or that it is missing


def _plain(config: Any, described: Any, file: bytes) -> Tokenizer | None:
    """See `plain_tokenizer`; files that are not as they should be may raise anything."""
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
    import tokenizers  # noqa: PLC0415 - with transformers, an optional dependency

    tokenizer = tokenizers.Tokenizer.from_str(file.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = config.get("bos_token")
    return _Plain(tokenizer, None if bos is None else tokenizer.token_to_id(bos))


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    return checkpoint.source.read(name, max_bytes=_MAX_FILE_BYTES)
