"""Where a tokenizer's own file is read without transformers, its tokens are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import ModelError
from mergekit_ray.routing import tokenizer
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


def test_a_broken_file_is_an_error(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        tokenizer.load_tokenizer(opened(model))
