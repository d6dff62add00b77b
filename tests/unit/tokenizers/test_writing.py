"""The files of a tokenizer, and ids in configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mergekit_ray.core.errors import PlanError
from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.uniting import united
from mergekit_ray.tokenizers.writing import files_of, remapped_ids
from support.tokenizers.texts import TEXTS
from support.tokenizers.tiny import KINDS, byte_level, opened, read, save, with_added


def written(files: dict[str, str], folder: Path) -> Any:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_written(kind: str, tmp_path: Path) -> None:
    one = read(save(tmp_path / "one", with_added(KINDS[kind](), "<|a|>"), {"eos_token": "<|a|>"}))
    files = files_of(one)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert {name: json.loads(text) for name, text in files.items()} == {"tokenizer.json": one.data, **one.settings}
    again, loaded = AutoTokenizer.from_pretrained(tmp_path / "one"), written(files, tmp_path / "two")
    for text in TEXTS:
        assert loaded(text) == again(text)
    assert files == files_of(read(opened(tmp_path / "two")))


def test_only_files_that_say_something_of_their_own_are_written(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    more = {
        "special_tokens_map": {"eos_token": "<|e|>"},
        "added_tokens": {"<x>": size, "<|e|>": size + 1},
        "generation_config": {"eos_token_id": size + 1},
    }
    one = read(save(tmp_path, tokenizer, {"tokenizer_class": "GPT2Tokenizer"}, **more))
    files = files_of(one)
    assert files.keys() == {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    }
    added = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    assert added == more["added_tokens"]
    loaded = written(files, tmp_path / "new")
    assert type(loaded).__name__ == "GPT2Tokenizer"
    assert loaded.convert_tokens_to_ids(["<x>", "<|e|>"]) == [size, size + 1]
    assert loaded.eos_token_id == size + 1


def test_the_list_of_added_tokens_is_carried_on(tmp_path: Path) -> None:
    a, b = with_added(byte_level(), "<|a|>"), with_added(byte_level(), "<|b|>")
    size = byte_level().get_vocab_size()
    listed = {"added_tokens_decoder": {str(size): {"content": "<|a|>", "special": True}}, "eos_token": "<|a|>"}
    both = united([read(save(tmp_path / "a", a, listed)), read(save(tmp_path / "b", b))])
    decoder = json.loads(files_of(both)["tokenizer_config.json"])["added_tokens_decoder"]
    assert {number: token["content"] for number, token in decoder.items()} == {
        str(size): "<|a|>",
        str(size + 1): "<|b|>",
    }
    assert written(files_of(both), tmp_path / "both").get_vocab() == both.ids


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    one = read(save(tmp_path, with_added(byte_level(), "<|начало|>")))
    assert "<|начало|>" in files_of(one)["tokenizer.json"]


def test_a_chat_template_takes_the_place_of_that_in_the_settings(tmp_path: Path) -> None:
    one = read(save(tmp_path / "one", byte_level(), {"chat_template": "old"}))
    assert json.loads(files_of(one)["tokenizer_config.json"])["chat_template"] == "old"
    files = files_of(one, chat_template="new {{ 'ü' }}")
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    assert files["chat_template.jinja"] == "new {{ 'ü' }}"
    assert written(files, tmp_path / "two").chat_template == "new {{ 'ü' }}"
    assert one.settings["tokenizer_config.json"]["chat_template"] == "old"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    """One with <|s|>, <|e|>, <|x|> at the end, one with <|p|>, <|e|>, <|s|>."""
    return (
        read(save(tmp_path / "old", with_added(byte_level(), "<|s|>", "<|e|>", "<|x|>"))),
        read(save(tmp_path / "new", with_added(byte_level(), "<|p|>", "<|e|>", "<|s|>"))),
    )


def test_ids_of_a_config_name_the_same_tokens(pair: tuple[Tokenizer, Tokenizer]) -> None:
    old, new = pair
    config = {
        "bos_token_id": old.ids["<|s|>"],
        "eos_token_id": [old.ids["<|e|>"], old.ids["<|x|>"], old.ids["<|s|>"]],
        "pad_token_id": None,
        "unk_token_id": -1,
        "sep_token_id": max(old.ids.values()) + 7,
        "vocab_size": old.ids["<|s|>"],
        "do_sample": True,
        "empty_token_ids": [],
        "text_config": {"image_token_index": old.ids["<|e|>"], "deeper": {"mask_token_id": old.ids["a"]}},
        "language_token_ids": {"de": old.ids["<|s|>"]},
    }
    before = json.dumps(config)
    assert remapped_ids(config, old, new) == {
        **config,
        "bos_token_id": new.ids["<|s|>"],
        "eos_token_id": [new.ids["<|e|>"], new.ids["<|s|>"]],
        "text_config": {"image_token_index": new.ids["<|e|>"], "deeper": {"mask_token_id": new.ids["a"]}},
        "language_token_ids": {"de": new.ids["<|s|>"]},
    }
    assert json.dumps(config) == before
    assert remapped_ids(config, old, old) == config


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_token_that_is_not_there_is_an_error(nested: bool, as_list: bool, pair: tuple[Tokenizer, Tokenizer]) -> None:
    old, new = pair
    number = old.ids["<|x|>"]
    config: dict[str, Any] = {"eos_token_id": [number] if as_list else number}
    with pytest.raises(PlanError, match=f"eos_token_id is {number}, which is '<.x.>', and the tokenizer of new has no"):
        remapped_ids({"text_config": config} if nested else config, old, new)


@pytest.mark.parametrize("as_list", [False, True])
def test_an_id_of_no_token_does_not_become_a_token(as_list: bool, tmp_path: Path) -> None:
    """As a padding row's, which the new tokenizer gives to a token that another model brought."""
    old = read(save(tmp_path / "old", with_added(byte_level(), "<|e|>")))
    new = read(save(tmp_path / "new", with_added(byte_level(), "<|e|>", "<|new|>")))
    number = new.ids["<|new|>"]
    config = {"pad_token_id": [old.ids["<|e|>"], number] if as_list else number}
    with pytest.raises(
        PlanError, match=f"pad_token_id is {number}, which is none of its tokens, and would be '<.new.>'"
    ):
        remapped_ids(config, old, new)
    assert remapped_ids({"pad_token_id": number + 1}, old, new) == {"pad_token_id": number + 1}


def test_a_config_without_end_is_an_error(pair: tuple[Tokenizer, Tokenizer]) -> None:
    config: dict[str, Any] = {}
    for _ in range(10_000):
        config = {"x": config}
    with pytest.raises(PlanError, match="nested too deeply"):
        remapped_ids(config, *pair)


def test_lists_of_tokens_follow_them(pair: tuple[Tokenizer, Tokenizer]) -> None:
    """And lose the tokens, or the words with a token, that are gone."""
    old, new = pair
    s, e, x, a = (old.ids[token] for token in ("<|s|>", "<|e|>", "<|x|>", "a"))
    news = {number: new.ids[old.names()[number]] for number in (s, e, a)}
    config = {
        "suppress_tokens": [s, x, -1, e],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[a, s], [x, a], [e]],
        "force_words_ids": [[[s], [x]], [[a]]],
        "forced_decoder_ids": [[1, s], [2, x]],
        "sequence_bias": [[[a, s], -1.5], [[x], 2.0]],
        "generation": {"suppress_tokens": [x]},
    }
    assert remapped_ids(config, old, new) == {
        "suppress_tokens": [news[s], -1, news[e]],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[news[a], news[s]], [news[e]]],
        "force_words_ids": [[[news[a]]]],
        "forced_decoder_ids": [[1, news[s]]],
        "sequence_bias": [[[news[a], news[s]], -1.5]],
        "generation": {"suppress_tokens": []},
    }
