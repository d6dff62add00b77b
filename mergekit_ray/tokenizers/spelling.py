"""What tokens stand for: the bytes of text behind the way in which a tokenizer writes them.

A byte-level vocabulary has ``Ġthe`` for `` the`` and ``Ã`` for the byte C3; others have ``▁the`` and ``<0xC3>``, and
WordPiece has ``the`` and ``##the`` for what begins and what goes on within a word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.uniting import manner

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ASCII: Final = 0x80


@dataclass(frozen=True, slots=True)
class Spelling:
    """What one token stands for.

    Attributes:
        data: the bytes of text; a token that begins a word begins with a space where its tokenizer says so.
        is_added: it is an added token, which stands for its own text.
        is_byte: it is there for a single byte, whatever that is part of.
    """

    data: bytes
    is_added: bool = False
    is_byte: bool = False


def spellings(tokenizer: Tokenizer) -> dict[str, Spelling]:
    """What every token of a tokenizer stands for, in the order of its ids."""
    _, is_by_bytes, space, within, end = manner(tokenizer)
    spell = _of_bytes if is_by_bytes else functools.partial(_of_text, space=space, within=within, end=end)
    names = tokenizer.names()
    return {
        names[number]: Spelling(names[number].encode("utf-8", "surrogatepass"), is_added=True)
        if names[number] in tokenizer.added
        else spell(names[number])
        for number in sorted(names)
    }


@functools.cache
def byte_characters() -> Mapping[str, int]:
    """The character that byte-level vocabularies write for each byte.

    Bytes that are printable in Latin-1 are themselves; the others are the characters from U+0100 on, in their order
    (Radford et al. 2019, "Language models are unsupervised multitask learners", and its published code's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _of_bytes(token: str) -> Spelling:
    table = byte_characters()
    if not all(character in table for character in token):
        return Spelling(token.encode("utf-8", "surrogatepass"))
    data = bytes(table[character] for character in token)
    return Spelling(data, is_byte=len(data) == 1 and data[0] >= _ASCII)


def _of_text(token: str, *, space: str, within: str, end: str) -> Spelling:
    byte = _BYTE.fullmatch(token)
    if byte is not None:
        return Spelling(bytes([int(byte[1], 16)]), is_byte=True)
    text = token.replace(space, " ") if space else token
    if within:
        text = text.removeprefix(within) if text.startswith(within) else f" {text}"
    if end and text.endswith(end):
        text = f"{text.removesuffix(end)} "
    return Spelling(text.encode("utf-8", "surrogatepass"))
