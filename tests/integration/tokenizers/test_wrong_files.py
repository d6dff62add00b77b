"""Tokenizers and recipes that cannot be right: told what and where, with a remedy, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from support.models import config_of
from support.tokenizers.models import byte_level, ids_of, rows_of, save_model, unigram, wordpiece

START, END = "<|im_start|>", "<|im_end|>"
LARGE = "{{ messages }}" + "x" * 10_000_000
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    tokenizers = {
        "base": byte_level(),
        "chat": byte_level([START, END]),
        "words": wordpiece(["hello", "##lo"]),
        "pieces": unigram({"\u2581hello": -1.0}),
    }
    made = {name: save_model(root / name, each, seed) for seed, (name, each) in enumerate(tokenizers.items())}
    made["wide"] = save_model(root / "wide", byte_level([START]), 9, hidden_size=16)
    made["bare"] = copied(made["base"], root / "bare")
    for file in [*made["bare"].glob("tokenizer*"), *made["bare"].glob("special*")]:
        file.unlink()
    return made


def copied(folder: Path, target: Path, edit: Edit | None = None, file: str = "tokenizer.json") -> Path:
    """A copy of a model with a JSON file edited in place."""
    shutil.copytree(folder, target)
    if edit is not None:
        data = json.loads((target / file).read_text())
        edit(data)
        (target / file).write_text(json.dumps(data))
    return target


def recipe(*models: Path, **rest: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, "dtype": "float32", "tokenizer_source": "union", **rest}


def told(given: dict[str, Any], out: Path) -> str:
    """What the merge says as it fails."""
    with pytest.raises(MergekitRayError) as caught:
        mergekit_ray.merge(given, out)
    assert not out.exists()
    message = str(caught.value)
    assert "\n  " in message, "no remedy"
    return message


def more_tokens(data: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] += [{"id": 263 + i, "content": f"<more{i}>", "special": True, **flags} for i in range(4)]


def set_id(token: str, number: int) -> Edit:
    return lambda data: data["model"]["vocab"].update({token: number})


FILES: dict[str, tuple[Edit, str]] = {
    "two tokens of one id": (set_id("he", 257), "'he' and 'll' have the same id, 257"),
    "an added token's id taken": (
        lambda data: data["added_tokens"][-1].update(id=261),
        "tokenizer.json: gives the token '<|im_end|>' the id 261, but it is loaded with the id 262",
    ),
    "an added token's id beyond": (
        lambda data: data["added_tokens"][-1].update(id=5000),
        "tokenizer.json: gives the token '<|im_end|>' the id 5000, but it is loaded with the id 262",
    ),
    "an endless id": (set_id("he", 1 << 40), "'he' has the id 1099511627776; ids are from 0 to 16777215"),
    "no model": (lambda data: data.pop("model"), "there is no `model` with a vocabulary"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_tokenizer_that_lies_of_ids(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    edit, what = FILES[case]
    wrong = copied(folders["chat"], tmp_path / "wrong", edit)
    message = told(recipe(folders["base"], wrong), tmp_path / "out")
    assert message.startswith(f"{wrong}/tokenizer.json: ")
    assert what in message


def test_a_file_that_is_cut_short(folders: dict[str, Path], tmp_path: Path) -> None:
    wrong = copied(folders["chat"], tmp_path / "wrong")
    (wrong / "tokenizer.json").write_bytes((wrong / "tokenizer.json").read_bytes()[:1000])
    message = told(recipe(folders["base"], wrong), tmp_path / "out")
    assert message.startswith(f"{wrong}/tokenizer.json: the file is not valid JSON")


def test_more_tokens_than_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    """The model is named whose tokenizer it is, wherever it stands in the recipe."""
    more = copied(folders["chat"], tmp_path / "more", more_tokens)
    for given in (recipe(folders["base"], more), recipe(more, folders["base"], base_model=str(more))):
        message = told(given, tmp_path / "out")
        assert (
            f"no model has a row for 4 tokens of the tokenizer of {more}, which itself has 263 rows only: "
            "'<more0>', '<more1>', '<more2>', ..." in message
        )
    tokens = {f"<more{i}>": {"source": {"kind": "zero"}} for i in range(4)}
    tokenizer = {"source": "union", "tokens": tokens}
    given = recipe(folders["base"], more, tokenizer=tokenizer, tokenizer_source=None)
    mergekit_ray.merge(given, tmp_path / "out")
    assert not rows_of(tmp_path / "out")["<more3>"].any()


def test_a_token_beyond_the_rows_is_another_models(folders: dict[str, Path], tmp_path: Path) -> None:
    beyond = copied(folders["chat"], tmp_path / "beyond", set_id("he", 900))
    result = mergekit_ray.merge(recipe(folders["base"], beyond), tmp_path / "out")
    assert torch.equal(rows_of(tmp_path / "out")["he"], rows_of(folders["base"])["he"])
    [warning] = result.plan.warnings
    assert f"{beyond} has 263 rows, and 1 token with an id beyond them, first 'he' (900)" in warning


def test_a_config_that_counts_other_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    """The rows count that are there."""
    wrong = copied(folders["chat"], tmp_path / "wrong", lambda config: config.update(vocab_size=100), "config.json")
    result = mergekit_ray.merge(recipe(folders["base"], wrong), tmp_path / "out")
    [warning] = result.plan.warnings
    assert "says vocab_size 100, and 'model.embed_tokens.weight' has 263 rows" in warning
    assert config_of(tmp_path / "out")["vocab_size"] == 263 == len(ids_of(tmp_path / "out"))


def tokenizer(**options: Any) -> dict[str, Any]:
    return {"tokenizer_source": None, "tokenizer": {"source": "union", **options}}


RECIPES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "a token of no model": (
        ("base", "chat"),
        tokenizer(tokens={"<|nope|>": {"force": True}}),
        "'<|nope|>' is no token of the tokenizer",
    ),
    "an id beyond": (
        ("base", "chat"),
        tokenizer(tokens={"he": {"source": {"kind": "model_token", "model": "CHAT", "token_id": 263}}}),
        "token_id 263 is beyond the 263 rows of",
    ),
    "the empty token": (("base",), tokenizer(tokens={"": {"source": {"kind": "zero"}}}), "the empty text"),
    "half a character": (
        ("base",),
        tokenizer(tokens={"\ud800": {"source": {"kind": "zero"}}}),
        r"tokenizer.tokens: '\ud800' is not valid Unicode",
    ),
    "padded to nothing": (("base",), tokenizer(pad_to_multiple_of=0), "expected at least 1, found 0"),
    "padded without end": (("base",), tokenizer(pad_to_multiple_of=10**15), "expected at most 1048576"),
    "BPE and WordPiece": (
        ("base", "words"),
        {},
        "BASE is a byte-level BPE, that of WORDS is a WordPiece that begins what goes on within a word with '##'",
    ),
    "WordPiece and Unigram": (("words", "pieces"), {}, "PIECES is a Unigram that writes spaces as"),
    "no tokenizer": (("base", "bare"), {}, "model BARE: there is no tokenizer beside the model"),
    "a base without": (("base", "chat"), {"base_model": "BARE"}, "model BARE: there is no tokenizer beside the model"),
    "a source without": (("base", "chat"), {"tokenizer_source": "BARE"}, "model BARE: there is no tokenizer"),
    "a source that is not there": (("base", "chat"), {"tokenizer_source": "BASE-no"}, "BASE-no: no such folder"),
    "a row of another width": (
        ("base", "chat"),
        tokenizer(tokens={START: {"source": "WIDE", "force": True}}),
        "WIDE has no rows as wide as those of BASE",
    ),
    "tokens of another width": (
        ("base", "base"),
        {"tokenizer_source": "WIDE"},
        "no model has a row for 1 token of the tokenizer of WIDE: '<|im_start|>'",
    ),
    "a model of another width": (("base", "wide"), {}, "hidden_size: 8 in BASE, 16 in WIDE"),
    "a large template": (("base", "chat"), {"chat_template": LARGE}, "the chat template has 10.0 MB"),
    "an endless template": (
        ("base", "chat"),
        {"chat_template": "{% for a in range(10**9) %}{{ a }}{% endfor %}"},
        "the chat template does not work, line 1: Range too big",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    names, rest, what = RECIPES[case]

    def placed(text: str) -> str:
        for name, folder in folders.items():
            text = text.replace(name.upper(), json.dumps(str(folder))[1:-1])
        return text

    given = recipe(*(folders[name] for name in names), **json.loads(placed(json.dumps(rest))))
    assert placed(what) in told(given, tmp_path / "out")


def test_a_large_template_of_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    large = copied(folders["base"], tmp_path / "large")
    (large / "chat_template.jinja").write_text(LARGE)
    for rest in ({}, {"chat_template": "auto"}):
        message = told(recipe(large, folders["chat"], **rest), tmp_path / "out")
        assert message.startswith(f"{large}/chat_template.jinja: the chat template has 10.0 MB")
