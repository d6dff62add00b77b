"""What tokens stand for, and which tokens of two tokenizers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.tokenizers.encoding import pieces_of
from mergekit_ray.tokenizers.matching import matches
from mergekit_ray.tokenizers.reading import Tokenizer, read_tokenizer
from mergekit_ray.tokenizers.spelling import Spelling, byte_characters, spellings
from support.tokenizers import tiny
from support.tokenizers.models import byte_level, unigram, wordpiece

MERGES = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("Ã", "©"), ("h", "e")]
"""`` the`` and ``é``."""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_(tokenizer: Any) -> Tokenizer:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = read_tokenizer(tiny.save(folder, tokenizer))
        assert found is not None
        return found

    return read_


def test_bytes_are_written_as_the_tokenizers_library_writes_them() -> None:
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character, byte in byte_characters().items():
        if byte < 0x80:
            [(written, _)] = split.pre_tokenize_str(chr(byte))
            assert written == character
    assert sorted(byte_characters().values()) == list(range(256))
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_each_kind_is_spelt_in_its_way(read: Any) -> None:
    by_bytes = spellings(read(byte_level(["<|é|>"], MERGES)))
    assert by_bytes["Ġthe"] == Spelling(b" the")
    assert by_bytes["Ã©"] == Spelling("é".encode())
    assert by_bytes["Ã"] == Spelling(b"\xc3", is_byte=True)
    assert by_bytes["a"] == Spelling(b"a")
    assert by_bytes["<|é|>"] == Spelling("<|é|>".encode(), is_added=True)
    fallback = spellings(read(tiny.byte_fallback()))
    assert fallback["<0x0A>"] == Spelling(b"\n", is_byte=True)
    assert fallback["▁the"] == Spelling(b" the")
    pieces = spellings(read(unigram({"▁the": -1.0, "the": -2.0})))
    assert (pieces["▁the"].data, pieces["the"].data) == (b" the", b"the")
    words = spellings(read(wordpiece(["the", "##the"])))
    assert (words["the"].data, words["##the"].data) == (b" the", b"the")


def named(model: Tokenizer, donor: Tokenizer, table: Any) -> dict[str, str]:
    return {donor.names()[theirs]: model.names()[ours] for theirs, ours in table.items()}


def test_equal_tokenizers_match_token_by_token(read: Any) -> None:
    for make in (byte_level(["<a>"]), tiny.byte_fallback(), tiny.unigram(), tiny.word_piece(), tiny.word_level()):
        tokenizer = read(make)
        found = matches(tokenizer, tokenizer)
        assert found.same == {number: number for number in tokenizer.names()}
        assert not found.by_byte
        assert not found.by_prefix


def test_words_match_across_kinds(read: Any) -> None:
    model = read(byte_level(merges=MERGES))
    donor = read(unigram({"▁the": -1.0, "é": -2.0, "Ã": -3.0, "thex": -4.0, "▁them": -4.0, "漢": -5.0}, ["<new>"]))
    found = matches(model, donor)
    assert named(model, donor, found.same) == {"▁the": "Ġthe", "é": "Ã©", "<s>": "<s>", "</s>": "</s>"}
    assert named(model, donor, found.by_prefix) == {"thex": "th", "▁them": "Ġthe"}
    back = named(donor, model, matches(donor, model).same)
    assert (back["Ġthe"], back["Ã©"]) == ("▁the", "é")


def test_the_same_character_need_not_be_the_same_token(read: Any) -> None:
    """In a byte-level vocabulary ``é`` is the byte E9."""
    found = matches(read(byte_level()), read(unigram({"é": -1.0})))
    assert set(found.same.values()) == {read(byte_level()).ids["<s>"], read(byte_level()).ids["</s>"]}
    assert not found.by_byte


def test_bytes_match_only_as_bytes(read: Any) -> None:
    model, donor = read(byte_level()), read(tiny.byte_fallback())
    found = matches(model, donor)
    by_byte = named(model, donor, found.by_byte)
    assert len(by_byte) == 256
    assert (by_byte["<0x0A>"], by_byte["<0x41>"], by_byte["<0xC3>"]) == ("Ċ", "A", "Ã")
    assert not found.same.keys() & found.by_byte.keys()
    back = named(donor, model, matches(donor, model).by_byte)
    assert back["Ã"] == "<0xC3>"
    assert "a" not in back, "the letter is a token there"


def test_pieces_are_those_that_the_model_splits_text_into(read: Any) -> None:
    model = read(byte_level(merges=MERGES))
    donor = read(unigram({"▁the": -1.0, "then": -2.0, "▁": -3.0}, ["<x>"]))
    numbers = [donor.ids[token] for token in ("then", "▁", "<x>")]
    found = pieces_of(model, donor, numbers)
    names = model.names()
    assert [[names[piece] for piece in found[number]] for number in numbers] == [
        ["th", "e", "n"],
        ["Ġ"],
        ["<", "x", ">"],
    ]


def test_parts_of_characters_are_made_of_bytes(read: Any) -> None:
    model, donor = read(tiny.byte_fallback()), read(byte_level(merges=[("æ", "¼"), ("æ¼", "¢")]))
    [pieces] = pieces_of(model, donor, [donor.ids["æ¼"]]).values()
    assert [model.names()[piece] for piece in pieces] == ["<0xE6>", "<0xBC>"]


def test_what_the_model_has_no_tokens_for_is_left_out(read: Any) -> None:
    model, donor = read(wordpiece(["a", "##b"])), read(byte_level(merges=[("a", "b"), ("z", "z")]))
    found = pieces_of(model, donor, [donor.ids["ab"], donor.ids["zz"]])
    assert [model.names()[piece] for piece in found[donor.ids["ab"]]] == ["a", "##b"]
    assert not found[donor.ids["zz"]]
