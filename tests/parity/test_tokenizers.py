"""Models of different tokens, brought to common ones by both programs: each token has the same row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parity.conftest import Program
from support.tokenizers.models import (
    BYTES,
    EMBEDDING,
    HEAD,
    byte_level,
    ids_of,
    rows_of,
    save_model,
    unigram,
    wordpiece,
)

pytestmark = pytest.mark.parity

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
OTHER_MERGES = [("l", "l"), ("h", "e"), ("w", "o")]


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    tokenizers: dict[str, Any] = {
        "base": byte_level(),
        "chat": byte_level([START, END]),
        "tools": byte_level([END, PAD]),
        "middle": byte_level([START], alphabet=[*BYTES[:50], "<|mid|>", *BYTES[50:]]),
        "other": byte_level(["<|x|>"], OTHER_MERGES, list(reversed(BYTES))),
        "unigram": unigram({"▁he": -1.0, "ll": -2.0, "o": -3.0}),
        "unigram_more": unigram({"▁he": -1.0, "ll": -2.0, "o": -3.0, "▁wo": -2.5}, [END]),
        "words": wordpiece(["he", "##ll", "##o"]),
        "words_more": wordpiece(["he", "##ll", "##o", "wo"], [END]),
    }
    made = {name: save_model(root / name, each, seed) for seed, (name, each) in enumerate(tokenizers.items())}
    made["padded"] = save_model(root / "padded", byte_level([START]), 20, padding=3)
    return made


UNION: dict[str, Any] = {"tokenizer_source": "union"}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "union": (("base", "chat", "tools"), UNION, "linear"),
    "union of the padded": (("base", "padded", "tools"), UNION, "linear"),
    "union of scattered ids": (("base", "chat", "other"), UNION, "linear"),
    "union with tokens in the middle": (("base", "middle"), UNION, "linear"),
    "union of unigrams": (("unigram", "unigram_more"), UNION, "linear"),
    "union of wordpieces": (("words", "words_more"), UNION, "linear"),
    "union, task_arithmetic": (("base", "chat", "tools"), UNION, "task_arithmetic"),
    "union, ties": (("base", "chat", "tools"), UNION, "ties"),
    "union, slerp": (("base", "chat"), UNION, "slerp"),
    "base": (("base", "tools", "other"), {"tokenizer_source": "base"}, "linear"),
    "a merged model's": (("base", "tools", "other"), {"tokenizer_source": "{tools}"}, "linear"),
    "a token's source": (
        ("base", "chat", "tools"),
        {"tokenizer": {"source": "union", "tokens": {END: {"source": "{tools}", "force": True}}}},
        "linear",
    ),
    "zeros": (
        ("base", "chat", "tools"),
        {"tokenizer": {"source": "union", "tokens": {PAD: {"source": {"kind": "zero"}}}}},
        "linear",
    ),
    "another token's row": (
        ("base", "chat"),
        {
            "tokenizer": {
                "source": "union",
                "tokens": {START: {"source": {"kind": "model_token", "model": "{base}", "token": "he"}}},
            }
        },
        "linear",
    ),
    "padding": (("base", "chat"), {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}}, "linear"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_token_has_the_same_row(
    name: str, vocabularies: dict[str, Path], mergekit: Program, mergekit_ray: Program, tmp_path: Path
) -> None:
    models, rest, method = CASES[name]
    base, *others = models
    own = {"density": 0.5, "weight": 0.6} if method == "ties" else {} if method == "slerp" else {"weight": 0.6}
    listed = [
        {"model": str(vocabularies[each]), "parameters": own} for each in (others if own.get("density") else models)
    ]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(vocabularies[base]),
        "models": listed,
        "dtype": "float32",
        **_with_places(rest, vocabularies),
    }
    if method == "slerp":
        recipe["parameters"] = {"t": 0.3}
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    mergekit.run(file, tmp_path / "theirs", "--quiet", "--random-seed", "1", log=tmp_path / "theirs.log")
    mergekit_ray.run(file, tmp_path / "ours", "--quiet", log=tmp_path / "ours.log")
    assert ids_of(tmp_path / "ours").keys() == ids_of(tmp_path / "theirs").keys()
    for tensor in (EMBEDDING, HEAD):
        ours, theirs = (rows_of(tmp_path / side, tensor) for side in ("ours", "theirs"))
        for token, row in theirs.items():
            torch.testing.assert_close(ours[token], row, rtol=1e-6, atol=1e-7, msg=f"{tensor}, {token!r}")


def _with_places(value: Any, vocabularies: dict[str, Path]) -> Any:
    if isinstance(value, dict):
        return {key: _with_places(each, vocabularies) for key, each in value.items()}
    return str(vocabularies[value[1:-1]]) if isinstance(value, str) and value.startswith("{") else value


def test_a_token_that_only_the_tokenizers_own_model_has(
    vocabularies: dict[str, Path], mergekit: Program, mergekit_ray: Program, tmp_path: Path
) -> None:
    """mergekit leaves its row at zero; ours is that model's."""
    listed = [{"model": str(vocabularies[name]), "parameters": {"weight": 1.0}} for name in ("base", "tools")]
    file = tmp_path / "recipe.yml"
    source = str(vocabularies["chat"])
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": listed, "tokenizer_source": source}))
    mergekit.run(file, tmp_path / "theirs", "--quiet", log=tmp_path / "theirs.log")
    mergekit_ray.run(file, tmp_path / "ours", "--quiet", log=tmp_path / "ours.log")
    ours, theirs, own = rows_of(tmp_path / "ours"), rows_of(tmp_path / "theirs"), rows_of(vocabularies["chat"])
    assert not theirs[START].any()
    torch.testing.assert_close(ours[START], own[START])
