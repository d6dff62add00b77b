"""Adapters that PEFT saved with tokens of their own: merged like the models that PEFT makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import mergekit_ray
from mergekit_ray.core.errors import ModelError
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.adapters import make_adapter, quiet
from support.models import config_of, contents, load, logits, tensors_of
from support.tokenizers.models import EMBEDDING, HEAD, byte_level, ids_of, rows_of, save_model, save_tokenizer

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT = byte_level([START, END])

CASES: dict[str, dict[str, Any]] = {
    "whole embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole embedding, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of its tokens": {"trainable_token_indices": [261, 262]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "only resized": {},
}
SPLIT = "factors of the embedding"
"""Of an untied model PEFT saves the embedding with its new rows, and not the head."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and a fine-tune of it that added tokens."""
    root = tmp_path_factory.mktemp("adapters")
    tied = {"tie_word_embeddings": request.param}
    base = save_model(root / "base", byte_level(), 0, **tied)
    return {"base": base, "tools": save_model(root / "tools", byte_level([END, PAD]), 1, **tied)}


def is_tied(folder: Path) -> bool:
    return bool(config_of(folder)["tie_word_embeddings"])


def resized(base: Path) -> Any:
    """The base with rows for the adapter's tokens; the new ones are the same each time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    model.resize_token_embeddings(CHAT.get_vocab_size())
    return model


def adapter_with_tokens(base: Path, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """An adapter with a tokenizer of its own, and the model that PEFT makes of it."""
    adapter = make_adapter(resized(base), folder / "adapter", **{"target_modules": ["q_proj"], **settings})
    merged = PeftModel.from_pretrained(resized(base).double(), adapter).merge_and_unload().float()
    merged.save_pretrained(folder / "merged")
    return save_tokenizer(adapter, CHAT), save_tokenizer(folder / "merged", CHAT)


def merge(method: str, folders: dict[str, Path], chat: str, out: Path, **rest: Any) -> Path:
    parameters = {"weight": 0.5, "density": 0.6} if method == "ties" else {"weight": 0.5}
    listed = [{"model": model, "parameters": parameters} for model in (chat, str(folders["tools"]))]
    given = {"merge_method": method, "base_model": str(folders["base"]), "models": listed, "dtype": "float32"}
    mergekit_ray.merge({**given, "tokenizer_source": "union", **rest}, out)
    return out


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("case", CASES)
def test_union(case: str, method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    adapter, merged = adapter_with_tokens(folders["base"], tmp_path, **CASES[case])
    adapted = f"{folders['base']}+{adapter}"
    if case == SPLIT and not is_tied(folders["base"]):
        with pytest.raises(ModelError, match=r"(?s)only a part of the vocabulary .*merge the adapter with PEFT"):
            merge(method, folders, adapted, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merge(method, folders, adapted, tmp_path / "out")
    merge(method, folders, str(merged), tmp_path / "theirs")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    assert config_of(tmp_path / "out") == config_of(tmp_path / "theirs")
    written, wanted = contents(tmp_path / "out"), contents(tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert written[file] == wanted[file]
    assert {START, END, PAD} <= ids_of(tmp_path / "out").keys()
    assert torch.equal(rows_of(tmp_path / "out")[PAD], rows_of(folders["tools"])[PAD])
    torch.testing.assert_close(rows_of(tmp_path / "out")[START], rows_of(merged)[START], rtol=1e-6, atol=1e-7)
    assert (HEAD in ours) != is_tied(tmp_path / "out")
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()
    assert verify(open_source(str(tmp_path / "out"))).problems == []


def test_the_tokenizer_of_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    """An adapter is a model wherever a tokenizer or a row is to come from one."""
    adapter, merged = adapter_with_tokens(folders["base"], tmp_path, **CASES["rows of its tokens"])
    adapted = f"{folders['base']}+{adapter}"
    tokens = {PAD: {"source": {"kind": "model_token", "model": adapted, "token": START}, "force": True}}
    for name, model in (("out", adapted), ("theirs", str(merged))):
        tokenizer = {"source": model, "tokens": tokens}
        given = {"tokenizer": tokenizer, "tokenizer_source": None}
        merge("linear", folders, str(folders["base"]), tmp_path / name, **given)
    ours, theirs = rows_of(tmp_path / "out"), rows_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == {*ids_of(merged), PAD}
    for token, row in ours.items():
        torch.testing.assert_close(row, theirs[token], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[PAD], ours[START])


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(load(folders["base"]), tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    merge("linear", folders, f"{folders['base']}+{adapter}", tmp_path / "out")
    assert ids_of(tmp_path / "out") == ids_of(folders["tools"])
    assert torch.equal(tensors_of(tmp_path / "out")[EMBEDDING][261:], tensors_of(folders["tools"])[EMBEDDING][261:])


def test_tokens_that_the_adapter_has_no_rows_for(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its tokenizer knows them, but nobody resized the base: they have the rows of those that do have them."""
    adapter = make_adapter(load(folders["base"]), tmp_path / "adapter", target_modules=["q_proj"])
    adapted = f"{folders['base']}+{save_tokenizer(adapter, byte_level([END]))}"
    merge("linear", folders, adapted, tmp_path / "out")
    assert torch.equal(rows_of(tmp_path / "out")[END], rows_of(folders["tools"])[END])
