"""Small tokenizers of every kind, trained on `support.tokenizers.texts`, and their files.

Training twice does not always give the same tokenizer, so each is trained once. Tests change copies: see `edited`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import is_side_file
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.tokenizers import reading
from support.tokenizers.texts import TEXTS

BYTES: Final = [f"<0x{number:02X}>" for number in range(256)]


@cache
def byte_level(texts: tuple[str, ...] = TEXTS, size: int = 500) -> Tokenizer:
    """A BPE of bytes, as GPT-2, Llama 3 and Qwen have it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return found


@cache
def byte_fallback(texts: tuple[str, ...] = TEXTS, size: int = 600, alphabet: int = 120) -> Tokenizer:
    """A BPE of characters with bytes for those that it lacks, as sentencepiece makes it for Llama 2."""
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        limit_alphabet=alphabet,
        show_progress=False,
    )
    # Words one by one: a text that is not split makes tokens of whole sentences.
    found.train_from_iterator([word for text in texts for word in text.split()], trainer)
    data = json.loads(found.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    found = Tokenizer.from_str(json.dumps(data))
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return found


@cache
def unigram(texts: tuple[str, ...] = TEXTS, size: int = 300) -> Tokenizer:
    """As T5 has it."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return found


@cache
def word_piece(texts: tuple[str, ...] = TEXTS, size: int = 400) -> Tokenizer:
    """As BERT has it."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return found


@cache
def word_level(texts: tuple[str, ...] = TEXTS, size: int = 200) -> Tokenizer:
    """Whole words."""
    found = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    found.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False)
    )
    return found


KINDS: Final = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "WordLevel": word_level,
}


def with_added(tokenizer: Tokenizer, *tokens: str | AddedToken) -> Tokenizer:
    """A copy with more tokens at the end; texts become special ones."""
    found = Tokenizer.from_str(tokenizer.to_str())
    for token in tokens:
        if isinstance(token, str):
            found.add_special_tokens([token])
        else:
            found.add_tokens([token])
    return found


def data_of(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())


def edited(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """A copy with other parts of ``tokenizer.json``, or of its model where they are such."""
    data = data_of(tokenizer)
    for name, value in parts.items():
        (data if name in data else data["model"])[name] = value
    return Tokenizer.from_str(json.dumps(data))


def save(
    folder: Path,
    tokenizer: Tokenizer | str,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Checkpoint:
    """The files of a model without weights, opened.

    Args:
        folder: made.
        tokenizer: whose ``tokenizer.json`` is written.
        config: what else ``tokenizer_config.json`` says.
        more: further JSON files by name without its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    files = {
        "config": {"model_type": "llama"},
        "tokenizer_config": {"tokenizer_class": "TokenizersBackend", **(config or {})},
    }
    for name, content in {**files, **more}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return opened(folder)


def opened(folder: Path) -> Checkpoint:
    """A model's side files and config, without weights."""
    source = LocalSource(str(folder))
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    files = [file for file in source.list() if is_side_file(file.name)]
    return Checkpoint(source, folder.name, {}, {}, config, files)


def read(checkpoint: Checkpoint) -> reading.Tokenizer:
    found = reading.read_tokenizer(checkpoint)
    assert found is not None
    return found
