"""Uniting tokenizers: ids, what texts become, and that transformers loads the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.uniting import united, with_tokens
from mergekit_ray.tokenizers.writing import files_of
from support.tokenizers import texts
from support.tokenizers.texts import TEXTS
from support.tokenizers.tiny import (
    KINDS,
    byte_fallback,
    byte_level,
    data_of,
    edited,
    opened,
    read,
    save,
    unigram,
    with_added,
    word_piece,
)

EUROPEAN = (*texts.CODE, *texts.PROSE[:2], *texts.CHAT)
OTHER = (*texts.PROSE[2:], *texts.EMOJI)


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, text in files_of(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def union(tmp_path: Path, *tokenizers: Library | str, **config: Any) -> tuple[list[Tokenizer], Tokenizer, Any]:
    """The tokenizers, their union, and what transformers loads of it."""
    found = [read(save(tmp_path / f"model{i}", each, config)) for i, each in enumerate(tokenizers)]
    result = united(found)
    return found, result, AutoTokenizer.from_pretrained(written(result, tmp_path / "union"))


def ids(tokenizer: Any, text: str) -> list[int]:
    """Without the special tokens that a text does not spell out."""
    found = tokenizer.encode(text, add_special_tokens=False)
    return list(found.ids if isinstance(tokenizer, Library) else found)


def mapped(numbers: Sequence[int], source: Tokenizer, result: Tokenizer) -> list[int]:
    return [result.ids[source.names()[number]] for number in numbers]


def is_joined(first: Sequence[str], result: Sequence[str], known: set[str]) -> bool:
    """Whether ``result`` is ``first`` with runs of tokens joined to tokens that are not ``known``."""
    rest = list(first)
    for token in result:
        run = ""
        while len(run) < len(token):
            run += rest.pop(0)
            if token in known:
                break
        if run != token:
            return False
    return not rest


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_keeps_its_ids_and_the_second_follows_in_its_order(kind: str, tmp_path: Path) -> None:
    make: Callable[..., Library] = KINDS[kind]
    (a, b), result, loaded = union(tmp_path, with_added(make(EUROPEAN), "<|a|>"), with_added(make(OTHER), "<|b|>"))
    assert loaded.get_vocab() == result.ids
    assert result.ids.items() >= a.ids.items()
    assert result.ids.keys() == a.ids.keys() | b.ids.keys()
    new = sorted(result.ids.keys() - a.ids.keys(), key=result.ids.__getitem__)
    assert len(new) > 40
    assert new == sorted(new, key=b.ids.__getitem__)
    assert [result.ids[token] for token in new] == list(range(len(a.ids), len(result.ids)))
    assert {"<|a|>", "<|b|>"} <= set(loaded.get_added_vocab())


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_texts_come_back(kind: str, tmp_path: Path) -> None:
    _, _, loaded = union(tmp_path, KINDS[kind](EUROPEAN), KINDS[kind](OTHER))
    for text in TEXTS:
        assert loaded.decode(ids(loaded, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_a_text_is_split_as_by_the_first_and_joined_to_new_tokens(kind: str, tmp_path: Path) -> None:
    first = KINDS[kind](EUROPEAN)
    (a, _), result, _ = union(tmp_path, first, KINDS[kind](OTHER))
    both = Library.from_str(files_of(result)["tokenizer.json"])
    num_new = 0
    for text in EUROPEAN if kind == "byte fallback" else TEXTS:
        before, after = (each.encode(text, add_special_tokens=False).tokens for each in (first, both))
        assert is_joined(before, after, set(a.ids)), text
        num_new += len(set(after) - a.ids.keys())
    assert num_new or kind == "byte fallback"


BOTH_BYTE_LEVEL = (byte_level(EUROPEAN), byte_level(OTHER))


@pytest.fixture(scope="module")
def joined_byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Library]:
    folder = tmp_path_factory.mktemp("union")
    a, b = (read(save(folder / str(i), each)) for i, each in enumerate(BOTH_BYTE_LEVEL))
    return set(a.ids), Library.from_str(files_of(united([a, b]))["tokenizer.json"])


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from(sorted({word for text in TEXTS for word in text.split()})) | st.text()).map(" ".join)
)
def test_any_text_is_split_as_by_the_first(text: str, joined_byte_level: tuple[set[str], Library]) -> None:
    known, both = joined_byte_level
    assert is_joined(BOTH_BYTE_LEVEL[0].encode(text).tokens, both.encode(text).tokens, known)
    assert both.decode(both.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_a_text_without_new_tokens_is_encoded_as_before(kind: str, tmp_path: Path) -> None:
    first = KINDS[kind](EUROPEAN)
    (a, _), _, loaded = union(tmp_path, first, KINDS[kind](OTHER))
    same = 0
    for text in TEXTS:
        found = ids(loaded, text)
        if max(found, default=0) < len(a.ids):
            assert found == ids(first, text)
            same += 1
    assert same > 5


def test_pieces_of_a_unigram_keep_their_scores(tmp_path: Path) -> None:
    (a, b), result, _ = union(tmp_path, with_added(unigram(EUROPEAN), "<|a|>"), unigram(OTHER))
    scores, of_a, of_b = (dict(each.data["model"]["vocab"]) for each in (result, a, b))
    assert scores.items() >= of_a.items()
    assert {piece: scores[piece] for piece in of_b.keys() - of_a.keys()}.items() <= of_b.items()
    assert scores["<|a|>"] == min(of_a.values())


TUNED = (
    "<|im_start|>",
    "<|im_end|>",
    AddedToken("<tool_call>", normalized=False),
    AddedToken("France", single_word=True, normalized=False),
    AddedToken("[INST]", lstrip=True, rstrip=True, special=True),
)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tunes_that_added_tokens_encode_as_before(kind: str, tmp_path: Path) -> None:
    base = with_added(KINDS[kind](), "<|end|>")
    # All are copies of the base: the library changes a Unigram's scores a little whenever it reads them.
    sources = [
        with_added(base),
        with_added(base, *TUNED[:2], *TUNED[4:]),
        with_added(base, TUNED[1], TUNED[2], TUNED[3]),
    ]
    for first in range(3):
        found, result, loaded = union(tmp_path / str(first), *sources[first:], *sources[:first])
        assert loaded.get_vocab() == result.ids
        assert len(result.ids) == len(found[0].ids | found[1].ids | found[2].ids)
        assert result.data["model"] == found[0].data["model"]
        for i, source in enumerate(found):
            own = AutoTokenizer.from_pretrained(tmp_path / str(first) / f"model{i}")
            foreign = result.added.keys() - source.added.keys()
            for text in (*TEXTS, *(f"of{token}its {token} own" for token in source.added)):
                if not any(token in text for token in foreign):
                    assert ids(loaded, text) == mapped(ids(own, text), source, result)
                    assert loaded.decode(ids(loaded, text)) == own.decode(ids(own, text))


def test_an_added_token_keeps_its_flags(tmp_path: Path) -> None:
    flagged = AddedToken("France", single_word=True, lstrip=True, rstrip=True, normalized=True, special=False)
    _, result, loaded = union(tmp_path, byte_level(), with_added(byte_level(), flagged))
    assert loaded.added_tokens_decoder[result.ids["France"]] == flagged


def test_a_token_that_another_model_added_is_an_added_one_of_the_union(tmp_path: Path) -> None:
    first = byte_level(EUROPEAN)
    merges = data_of(first)["model"]["merges"]
    left, right = next((left, right) for left, right in merges if (left + right).isascii() and len(left) > 1)
    (a, _), result, loaded = union(tmp_path, first, with_added(first, AddedToken(left, normalized=False)))
    assert result.ids == a.ids
    assert ids(first, left + right) == [a.ids[left + right]]
    assert ids(loaded, left + right) == [a.ids[left], a.ids[right]]


def test_a_vocabulary_that_was_extended_is_what_comes_of_it(tmp_path: Path) -> None:
    data = data_of(byte_level())
    vocabulary, merges = sorted(data["model"]["vocab"].items(), key=lambda item: item[1]), data["model"]["merges"]
    cut = {**data, "model": {**data["model"], "vocab": dict(vocabulary[:400]), "merges": merges[: 400 - 256]}}
    (_, whole), result, loaded = union(tmp_path, json.dumps(cut), json.dumps(data))
    assert result.ids == whole.ids
    assert [list(merge) for merge in result.data["model"]["merges"]] == merges
    for text in TEXTS:
        assert ids(loaded, text) == ids(byte_level(), text)


BYTE_LEVEL_NAMES = {"bos": "<|end|>", "eos": "<|end|>", "unk": "<|end|>", "pad": "<|end|>"}
CLASSES: dict[str, tuple[Callable[..., Library], dict[str, str]]] = {
    "TokenizersBackend": (byte_level, BYTE_LEVEL_NAMES),
    "GPT2Tokenizer": (byte_level, BYTE_LEVEL_NAMES),
    "Qwen2Tokenizer": (byte_level, BYTE_LEVEL_NAMES),
    "LlamaTokenizer": (byte_fallback, {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<|end|>"}),
    "BertTokenizer": (
        word_piece,
        {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"},
    ),
    "T5Tokenizer": (unigram, {"eos": "</s>", "unk": "<unk>", "pad": "<|end|>"}),
}


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("listed", [False, True])
def test_classes_that_number_added_tokens_themselves_agree(tokenizer_class: str, listed: bool, tmp_path: Path) -> None:
    """Added tokens lie between the first one's vocabulary and the new tokens: they would put them elsewhere."""
    make, names = CLASSES[tokenizer_class]
    config: dict[str, Any] = {"tokenizer_class": tokenizer_class, "extra_ids": 0}
    config |= {f"{name}_token": token for name, token in names.items()}
    found = []
    for i, each in enumerate(
        (with_added(make(EUROPEAN), *names.values()), with_added(make(OTHER), *names.values(), "<|b|>"))
    ):
        decoder = {
            str(number): {name: getattr(token, name) for name in ("content", "special", "normalized")}
            for number, token in each.get_added_tokens_decoder().items()
        }
        found.append(
            read(save(tmp_path / str(i), each, {**config, **({"added_tokens_decoder": decoder} if listed else {})}))
        )
    result = united(found)
    loaded, own = (
        AutoTokenizer.from_pretrained(folder) for folder in (written(result, tmp_path / "union"), tmp_path / "0")
    )
    assert type(loaded).__name__ == tokenizer_class
    assert own.get_vocab() == found[0].ids
    assert loaded.get_vocab() == result.ids
    assert loaded.special_tokens_map == own.special_tokens_map
    same = 0
    for text in TEXTS:
        after = loaded(text)["input_ids"]
        if max(after) < len(found[0].ids):
            assert after == own(text)["input_ids"]
            same += 1
    assert same > 3


def test_vocabularies_with_gaps_and_padding(tmp_path: Path) -> None:
    data = data_of(byte_level(EUROPEAN))
    gaps = {token: number + 7 * (number > 300) for token, number in data["model"]["vocab"].items()}
    gaps["<|in|>"] = 600
    entry = {"id": 600, "content": "<|in|>", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    gapped = {**data, "model": {**data["model"], "vocab": gaps}, "added_tokens": [{**entry, "special": True}]}
    (a, _), result, loaded = union(tmp_path, json.dumps(gapped), with_added(byte_level(OTHER), "<|pad|>"))
    assert loaded.get_vocab() == result.ids
    assert result.ids.items() >= a.ids.items()
    assert min(result.ids[token] for token in result.ids.keys() - a.ids.keys()) == 601
    assert loaded.encode("def<|in|><|pad|>")[-2:] == [600, result.ids["<|pad|>"]]


def test_the_post_processor_is_the_first_ones(tmp_path: Path) -> None:
    second = with_added(byte_fallback(OTHER))
    second.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    _, _, loaded = union(tmp_path, byte_fallback(EUROPEAN), second)
    assert loaded("a")["input_ids"][0] == 1
    assert loaded("a")["input_ids"][-1] != 2


def test_tokens_matched_whole_are_matched_in_the_union(tmp_path: Path) -> None:
    first = edited(byte_level(EUROPEAN), ignore_merges=True)
    second = byte_level((*OTHER, "lighthouse " * 9), 400)
    assert second.token_to_id("Ġlighthouse")
    _, result, loaded = union(tmp_path, first, second)
    assert ids(loaded, " lighthouse") == [result.ids["Ġlighthouse"]]


@pytest.mark.parametrize("as_text", [False, True])
def test_merges_keep_the_first_ones_form(as_text: bool, tmp_path: Path) -> None:
    data = data_of(byte_level(EUROPEAN))
    if as_text:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    (a, _), result, loaded = union(tmp_path, json.dumps(data), byte_level(OTHER))
    merges = result.data["model"]["merges"]
    assert len(merges) > len(a.data["model"]["merges"])
    assert {type(merge) for merge in merges} == {str if as_text else list}
    assert loaded.get_vocab() == result.ids


def test_merges_of_parts_with_spaces_need_pairs(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    other = {"type": "BPE", "vocab": {" ": 0, "a": 1, " a": 2}, "merges": [[" ", "a"]]}
    (_, _), result, loaded = union(tmp_path, json.dumps({"model": model}), json.dumps({"model": other}))
    assert result.data["model"]["merges"] == [["a", "b"], [" ", "a"]]
    assert loaded.encode("ab a") == [2, 4]


def test_merges_with_a_mark_within_words(tmp_path: Path) -> None:
    marked = {"type": "BPE", "continuing_subword_prefix": "##"}
    model = {**marked, "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"]}
    other = {**marked, "vocab": {"a": 0, "##c": 1, "ac": 2}, "merges": ["a ##c"]}
    (_, _), result, loaded = union(tmp_path, json.dumps({"model": model}), json.dumps({"model": other}))
    assert [loaded.encode(text) for text in ("ab", "ac")] == [[result.ids["ab"]], [result.ids["ac"]]]


def test_what_is_not_alike_is_refused_with_both_kinds_named(tmp_path: Path) -> None:
    cases = {"bytes": byte_level(), "pieces": byte_fallback(), "words": word_piece(), "scores": unigram()}
    found = {name: read(save(tmp_path / name, each)) for name, each in cases.items()}
    said = {
        "bytes": "a byte-level BPE",
        "pieces": "a BPE with byte fallback that writes spaces as '▁'",
        "words": "a WordPiece that begins what goes on within a word with '##'",
        "scores": "a Unigram that writes spaces as '▁'",
    }
    for a in cases:
        for b in cases.keys() - {a}:
            with pytest.raises(ModelError, match="cannot be united") as caught:
                united([found[a], found[b]])
            assert f"that of {a} is {said[a]}, that of {b} is {said[b]}" in str(caught.value)


def test_a_merge_of_what_is_no_token_is_an_error(tmp_path: Path) -> None:
    good = read(save(tmp_path / "good", byte_level(EUROPEAN)))
    data = data_of(byte_level(OTHER))
    data["model"]["merges"][3] = ["a", "qqq"]
    bad = read(save(tmp_path / "bad", json.dumps(data)))
    for order in ([good, bad], [bad, good]):
        with pytest.raises(ModelError, match=r"bad: tokenizer\.json: a merge joins 'a' and 'qqq'"):
            united(order)


def test_one_alone_and_nothing_new_stay_what_they_are(tmp_path: Path) -> None:
    one = read(save(tmp_path / "one", with_added(byte_level(), "<|a|>")))
    same = read(save(tmp_path / "same", byte_level()))
    assert united([one]) is one
    assert united([one, same]) is one
    assert with_tokens(one, ["<|a|>"]) is one


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_added_as_plain_text(kind: str, tmp_path: Path) -> None:
    one = read(save(tmp_path / "one", with_added(KINDS[kind](), "<|a|>")))
    more = with_tokens(one, ["<think>", "<|a|>", "</think>", "<think>"])
    loaded = AutoTokenizer.from_pretrained(written(more, tmp_path / "more"))
    size = len(one.ids)
    assert loaded.get_vocab() == more.ids == {**one.ids, "<think>": size, "</think>": size + 1}
    assert not loaded.added_tokens_decoder[size].special
    assert size in ids(loaded, "x<think>y")


def test_an_empty_text_is_no_token(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="empty"):
        with_tokens(read(save(tmp_path / "one", byte_level())), ["<think>", ""])


def test_what_is_opened_from_a_union_is_the_union(tmp_path: Path) -> None:
    _, result, _ = union(tmp_path, with_added(unigram(EUROPEAN), "<|a|>"), unigram(OTHER), pad_token="<|pad|>")
    again = read(opened(tmp_path / "union"))
    assert again.ids == result.ids
    assert again.special == result.special == {"pad_token_id": result.ids["<|pad|>"]}
