"""Where a chat template comes from: a name, a recipe's text, a file, or the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.strict_json import parse_config
from mergekit_ray.core.errors import CheckpointError, ConfigError, MergekitRayError
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.core.spelling import nearest

NAMED: Final[Mapping[str, Path]] = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.jinja"))}
"""The files of the templates that a recipe may name, by name."""

AUTO: Final = "auto"
"""A recipe's word for `most_common`."""

MAX_TEMPLATE_BYTES: Final = 1_000_000
"""The longest templates in use, with tools and reasoning, have some 20 kB."""

FILE_NAME: Final = "chat_template.jinja"
"""Where transformers keeps a model's template."""

_MAX_CONFIG_BYTES = 64 << 20
_FILES = (".jinja", ".jinja2", ".txt")
_MAX_SHOWN = 60
_NUM_THREADS = 16
_TOKENIZER_CONFIG = "tokenizer_config.json"
_REMEDY = "correct the file, or set chat_template in the recipe to a template"
_PROCESSOR_FILE = "chat_template.json"


def chat_template_of(value: str, *, where: str, read_file: Callable[[str], str] | None) -> str:
    """The Jinja text that a recipe's ``chat_template`` asks for.

    Args:
        value: a name of `NAMED`, a template (it holds ``{{`` or ``{%``), or the path of a file (``.jinja``, ``.txt``).
        where: the recipe's line, for messages.
        read_file: the text of a file by the path that the recipe gives; None if the recipe has no folder.

    Raises:
        ConfigError: it is none of these, the file cannot be read, or the text has more than `MAX_TEMPLATE_BYTES`.
    """
    word = value.strip()
    if "{{" in value or "{%" in value:
        text = value
    elif word in NAMED:
        text = NAMED[word].read_text(encoding="utf-8")
    elif word.lower().endswith(_FILES):
        text = _from_file(word, where, read_file)
    else:
        shown = repr(word if len(word) <= _MAX_SHOWN else f"{word[:_MAX_SHOWN]}...")
        raise ConfigError(
            f"{shown} is not a chat template; accepted: {AUTO}, {', '.join(NAMED)}, a Jinja template, or a path that "
            f"ends in .jinja, .jinja2 or .txt{nearest(word, (AUTO, *NAMED))}",
            where=where,
        )
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ConfigError(f"the chat template holds {half!r}, which is not valid Unicode", where=where) from None
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise ConfigError(_too_large(num_bytes), where=where, remedy="give a template; they have a few kB")
    return text


def _too_large(num_bytes: int) -> str:
    return f"the chat template has {format_bytes(num_bytes)}, more than the {format_bytes(MAX_TEMPLATE_BYTES)} allowed"


def _from_file(path: str, where: str, read_file: Callable[[str], str] | None) -> str:
    if read_file is None:
        raise ConfigError(
            f"the chat template is a file, {path!r}, but the recipe is not, so there is no folder to look in",
            where=where,
            remedy="write the template itself, or put the recipe into a file beside it",
        )
    try:
        return read_file(path)
    except MergekitRayError:
        raise
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start})"
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    raise ConfigError(
        f"the chat template {path!r} cannot be read: {reason}",
        where=where,
        remedy="correct the path; like those of models, it starts at the directory you run in",
    )


def stored_template(checkpoint: Checkpoint) -> str | None:
    """A model's chat template, or None if it has none.

    The first of these counts: ``chat_template.jinja``; ``chat_template`` in ``tokenizer_config.json``, of several the
    one called ``default``; ``chat_template`` in ``chat_template.json``, which processors of multimodal models have. A
    tokenizer that was saved with an adapter takes the place of the model's.

    Raises:
        CheckpointError: a file is malformed, or the template has more than `MAX_TEMPLATE_BYTES`.
        StorageError: a file could not be read.
    """
    beside = [checkpoint, *([checkpoint.adapter.checkpoint] if isinstance(checkpoint, AdaptedCheckpoint) else [])]
    sources = {file.name: each.source for each in beside for file in each.side_files}
    sizes = {file.name: file.num_bytes for each in beside for file in each.side_files}
    if FILE_NAME in sources:
        where = f"{sources[FILE_NAME].uri}/{FILE_NAME}"
        if sizes[FILE_NAME] > MAX_TEMPLATE_BYTES:
            raise CheckpointError(_too_large(sizes[FILE_NAME]), where=where, remedy=_REMEDY)
        return _decoded(sources[FILE_NAME].read(FILE_NAME, max_bytes=MAX_TEMPLATE_BYTES), where)
    for name in (_TOKENIZER_CONFIG, _PROCESSOR_FILE):
        if name in sources:
            where = f"{sources[name].uri}/{name}"
            content, _ = parse_config(sources[name].read(name, max_bytes=_MAX_CONFIG_BYTES), where, "file")
            if (found := _default(content.get("chat_template"), where)) is not None:
                return found
    return None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"the chat template is not UTF-8 (byte {error.start})", where=where, remedy=_REMEDY
        ) from None


def _default(value: Any, where: str) -> str | None:
    """Of several templates, by name or as a list of names and templates, the default."""
    if isinstance(value, list):
        several = all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in value)
        value = {each["name"]: each.get("template") for each in value} if several else value
    if isinstance(value, dict):
        value = value.get("default")
    if value is None:
        return None
    if not isinstance(value, str):
        what = (
            f"`chat_template` is {type(value).__name__} where transformers has a text, or a list of names and templates"
        )
    elif (num_bytes := len(value.encode())) > MAX_TEMPLATE_BYTES:
        what = _too_large(num_bytes)
    else:
        return value
    raise CheckpointError(what, where=where, remedy=_REMEDY)


def most_common(checkpoints: Sequence[Checkpoint]) -> tuple[str, list[str]] | None:
    """The chat template that most models have; of several that equally many have, the one that comes first.

    Returns:
        The template, and warnings: which models have another. None if no model has one.

    Raises:
        CheckpointError, StorageError: see `stored_template`.
    """
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="templates") as pool:
        stored = list(pool.map(stored_template, checkpoints))
    holders: dict[str, list[int]] = {}
    for index, text in enumerate(stored):
        if text is not None:
            holders.setdefault(_compared(text), []).append(index)
    if not holders:
        return None
    chosen = max(holders.values(), key=len)
    text = stored[chosen[0]]
    assert text is not None
    others = sorted(index for indices in holders.values() if indices is not chosen for index in indices)
    if not others:
        return text, []
    warning = (
        f"chat_template: {AUTO} takes the template of {_named(checkpoints, chosen)}; "
        f"{_named(checkpoints, others)} {'has' if len(others) == 1 else 'have'} another"
    )
    return text, [warning]


def _compared(text: str) -> str:
    """Without what Jinja ignores: the kind of line breaks, and one at the end."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _named(checkpoints: Sequence[Checkpoint], indices: Sequence[int]) -> str:
    names = [checkpoints[index].reference for index in indices]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
