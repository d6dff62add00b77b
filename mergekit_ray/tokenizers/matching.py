"""Which tokens of one tokenizer another one has, too, and what stands for the others there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.spelling import Spelling, spellings


@dataclass(frozen=True, slots=True)
class Matches:
    """Of some of a donor's tokens, by id, the id of a model's token.

    Attributes:
        same: tokens that stand for the same text.
        by_byte: tokens of the same single byte.
        by_prefix: tokens that the donor's begins with, the longest of them.
    """

    same: Mapping[int, int]
    by_byte: Mapping[int, int]
    by_prefix: Mapping[int, int]


def matches(model: Tokenizer, donor: Tokenizer) -> Matches:
    """Match the tokens of two tokenizers. What is in one table is not in another."""
    ours, theirs = spellings(model), spellings(donor)
    texts = _first(model, ours, lambda spelling: not (spelling.is_added or spelling.is_byte))
    single = _first(model, ours, lambda spelling: not spelling.is_added and len(spelling.data) == 1)
    longest = max(map(len, texts), default=0)
    same: dict[int, int] = {}
    by_byte: dict[int, int] = {}
    by_prefix: dict[int, int] = {}
    for token, spelling in theirs.items():
        number = donor.ids[token]
        if token in ours and ours[token].data == spelling.data:
            same[number] = model.ids[token]
        elif spelling.is_added:
            continue
        elif spelling.data in texts and not spelling.is_byte:
            same[number] = texts[spelling.data]
        elif len(spelling.data) == 1 and spelling.data in single:
            by_byte[number] = single[spelling.data]
        else:
            found = next((texts[start] for start in _starts(spelling.data, longest) if start in texts), None)
            if found is not None:
                by_prefix[number] = found
    return Matches(same, by_byte, by_prefix)


def _first(tokenizer: Tokenizer, spelt: Mapping[str, Spelling], wanted: Callable[[Spelling], bool]) -> dict[bytes, int]:
    """The lowest id of each text, of the tokens that are wanted."""
    found: dict[bytes, int] = {}
    for token, spelling in spelt.items():
        if wanted(spelling):
            found.setdefault(spelling.data, tokenizer.ids[token])
    return found


def _starts(data: bytes, longest: int) -> Iterator[bytes]:
    """What a text begins with, the longest first; not the text, nor nothing."""
    for length in range(min(len(data) - 1, longest), 0, -1):
        yield data[:length]
