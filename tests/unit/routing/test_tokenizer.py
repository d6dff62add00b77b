"""Where a tokenizer's own file is read without transformers, its tokens are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import ModelError
from mergekit_ray.routing import tokenizer
from mergekit_ray.routing.embeddings import embedding_rows
from mergekit_ray.routing.prompts import tokenize
from support.models import ModelLibrary
from support.references.routing import opened

PROMPTS = ["the cat", "  two  spaces ", "<s>the<s> end</s>", "Zażółć gęślą jaźń 🎉", "a\nb\tc", "<s><s>", "the <pad> x"]

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ModelLibrary:
    return ModelLibrary(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(library: ModelLibrary, tmp_path: Path) -> Path:
    """A model with a tokenizer that transformers takes as it is."""
    folder = tmp_path / "model"
    source = library.get("llama", 0, with_tokenizer=True)
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(folder: Path, name: str, change: Change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def is_plain(folder: Path) -> bool:
    """Whether transformers was left out."""
    return tokenizer.plain_tokenizer(opened(folder)) is not None


def by_transformers(folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "plain_tokenizer", lambda _: None)
        return tokenize(opened(folder), prompts)


def test_tokens_are_those_of_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_plain(model)
    assert tokenize(opened(model), PROMPTS) == by_transformers(model, PROMPTS, monkeypatch)


def test_truncation_and_padding_in_the_file_are_not_for_prompts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(model, "tokenizer.json", lambda data: data.update(truncation=truncation))
    prompts = ["the " * 20, "cat"]
    assert is_plain(model)
    assert tokenize(opened(model), prompts) == by_transformers(model, prompts, monkeypatch)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", lambda data: data.update(tokenizer_class="LlamaTokenizerFast")),
        ("tokenizer_config.json", lambda data: data.pop("tokenizer_class")),
        ("tokenizer_config.json", lambda data: data.update(add_prefix_space=True)),
        ("tokenizer_config.json", lambda data: data.update(pad_token="<new>")),
        (
            "tokenizer_config.json",
            lambda data: data.update(bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": True}),
        ),
        ("tokenizer.json", lambda data: [token.update(special=False) for token in data["added_tokens"]]),
    ],
)
def test_whatever_transformers_may_change_is_left_to_it(
    name: str, change: Change, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(model, name, change)
    assert not is_plain(model)


def test_older_files_are_left_to_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "special_tokens_map.json").write_text("{}")
    assert not is_plain(model)


DAMAGED = {
    "cut": b'{"added_tokens": [',
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "no object": b"[]",
    "nested": b"[" * 99_999,
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_damaged_file_is_named(name: str, damage: str, model: Path) -> None:
    (model / name).write_bytes(DAMAGED[damage])
    with pytest.raises(ModelError, match=r"cannot load the tokenizer: it is (not|nested)") as caught:
        tokenize(opened(model), ["the cat"])
    assert caught.value.where == str(model / name)
    assert name in str(caught.value.remedy)


ODD: list[object] = [None, True, -1, 1.5, "", "x" * 10_000, [], {}, [[]], {"content": []}, {"id": "0"}, 10**30]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value!s:.12}")
def test_odd_values_are_the_files_fault(name: str, value: object, model: Path) -> None:
    whole = json.loads((model / name).read_text())
    places = [*whole, "bos_token", "added_tokens", "vocab"]
    failures = []
    for place in places:
        edit(model, name, lambda data, place=place: data.update({place: value}))
        try:
            tokenize(opened(model), PROMPTS)
        except ModelError as error:
            failures.append(error)
        (model / name).write_text(json.dumps(whole))
    assert all(name in str(error.remedy) and len(error.what) < 500 for error in failures)
    assert failures or name == "tokenizer_config.json"


def test_what_a_prompt_shows_is_the_files_fault_too(model: Path) -> None:
    def without_unknown(data: dict[str, Any]) -> None:
        data["model"].update(type="WordLevel", unk_token="nowhere", vocab={"a": 0}, merges=None)

    edit(model, "tokenizer.json", without_unknown)
    with pytest.raises(ModelError, match=r"the tokenizer cannot read a prompt: .*Missing \[UNK\]") as caught:
        tokenize(opened(model), ["unheard of"])
    assert "tokenizer.json" in str(caught.value.remedy)


def test_a_pattern_that_backtracks_is_the_files_fault(model: Path) -> None:
    """Its engine gives up by a panic, which is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    edit(model, "tokenizer.json", lambda data: data.update(normalizer=None, pre_tokenizer=split))
    with pytest.raises(ModelError, match=r"the tokenizer cannot read a prompt: .*retry-limit"):
        tokenize(opened(model), ["a" * 60])


def test_a_token_that_no_row_is_for(model: Path) -> None:
    checkpoint = opened(model)
    for tokens in ([-1, 2], [2, 10_000]):
        with pytest.raises(ModelError, match="the tokenizer knows token"):
            embedding_rows(checkpoint, "model.embed_tokens.weight", tokens)
