"""Whether two models mean the same tokens by the same ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import is_vocabulary_file
from mergekit_ray.storage.protocols import FileStat, Source
from mergekit_ray.tokenizers.files import ADDED, CONFIG, SPECIAL_MAP, content, read, tokenizer_files
from mergekit_ray.tokenizers.reading import Tokenizer, named_texts

_NUM_EXAMPLES: Final = 3
_DIGEST: Final = re.compile(r"[0-9a-f]{32,64}(-\d+)?")
"""A version that is made from the content: S3's ETags, and the names that the Hub gives to contents."""

_Files = Mapping[str, tuple[Source, FileStat]]


@dataclass(frozen=True, slots=True)
class Difference:
    """How the ids of two tokenizers differ.

    Attributes:
        num_other: how many ids both have that mean other tokens.
        examples: the lowest such ids, with the first one's token and the second one's.
        only_a, only_b: ids that only the first or only the second has, in order.
    """

    num_other: int
    examples: tuple[tuple[int, str, str], ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]


def same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two models have the same tokenizer files, as far as these say which token has which id.

    Vocabularies are not read where their versions are digests of the content, or the places are the same. Settings are
    read if they differ, as they hold chat templates, too.

    Raises:
        ModelError: a file is too large, or settings are damaged.
        CheckpointError, StorageError: a file could not be read.
    """
    of_a, of_b = tokenizer_files(a), tokenizer_files(b)
    names = {name for name in (*of_a, *of_b) if is_vocabulary_file(name) or name in ("merges.txt", ADDED)}
    if not names <= of_a.keys() & of_b.keys():
        return False
    # The small files first: only if they agree are large ones read.
    if not all(_same(of_a, of_b, name) for name in (CONFIG, SPECIAL_MAP)) and _said(of_a) != _said(of_b):
        return False
    return all(_same(of_a, of_b, name) for name in sorted(names, key=lambda name: of_a[name][1].num_bytes))


def difference(a: Tokenizer, b: Tokenizer, num_rows: int | None = None) -> Difference | None:
    """How the ids of two tokenizers differ; None if each means the same token in both.

    Args:
        a: a tokenizer.
        b: another one.
        num_rows: how many ids count, from 0 on; all if None.
    """
    if a.ids == b.ids:
        return None
    of_a, of_b = (_below(each.names(), num_rows) for each in (a, b))
    if of_a == of_b:
        return None
    other = sorted(number for number in of_a.keys() & of_b.keys() if of_a[number] != of_b[number])
    return Difference(
        num_other=len(other),
        examples=tuple((number, of_a[number], of_b[number]) for number in other[:_NUM_EXAMPLES]),
        only_a=tuple(sorted(of_a.keys() - of_b.keys())),
        only_b=tuple(sorted(of_b.keys() - of_a.keys())),
    )


def _below(names: Mapping[int, str], num_rows: int | None) -> Mapping[int, str]:
    return names if num_rows is None else {number: token for number, token in names.items() if number < num_rows}


def _same(of_a: _Files, of_b: _Files, name: str) -> bool:
    """Whether both have a file with the same content, or neither has one."""
    if name not in of_a or name not in of_b:
        return (name in of_a) == (name in of_b)
    (source_a, a), (source_b, b) = of_a[name], of_b[name]
    if a.num_bytes != b.num_bytes:
        return False
    if a.version == b.version and (source_a.uri == source_b.uri or _DIGEST.fullmatch(a.version)):
        return True
    return read(source_a, a) == read(source_b, b)


def _said(files: _Files) -> tuple[dict[int, str], set[str]]:
    """Which tokens the settings add: with ids, and without."""
    settings = {name: content(*files[name]) for name in (CONFIG, SPECIAL_MAP) if name in files}
    decoder = settings.get(CONFIG, {}).get("added_tokens_decoder") or {}
    return {int(number): token["content"] for number, token in decoder.items()}, named_texts(settings)
