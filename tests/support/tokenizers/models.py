"""Small models whose vocabularies differ, with real tokenizers of the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from support.models import tensors_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll")]
"""`hell` is one token."""


def byte_level(
    added: Sequence[str] = (), merges: Sequence[tuple[str, str]] = MERGES, alphabet: Sequence[str] = BYTES
) -> Any:
    """A byte-level BPE with ``<s>``, ``</s>`` and further special tokens at the end."""
    tokens = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *added])
    return tokenizer


def unigram(pieces: Mapping[str, float], added: Sequence[str] = ()) -> Any:
    """A Unigram of pieces with their scores, as sentencepiece makes it; its first pieces are special."""
    listed = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *pieces.items()]
    tokenizer = Tokenizer(models.Unigram(listed, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *added])
    return tokenizer


def wordpiece(words: Sequence[str], added: Sequence[str] = ()) -> Any:
    """A WordPiece of words and what goes on within them (`##`)."""
    tokens = ["[UNK]", "<s>", "</s>", *words]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "<s>", "</s>", *added])
    return tokenizer


def save_model(
    folder: Path, tokenizer: Any, seed: int, *, padding: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A Llama with random weights and a row for each token, and ``padding`` more.

    Args:
        folder: where to.
        tokenizer: of the tokenizers library.
        seed: of the weights.
        padding: rows without a token.
        dtype: of the weights.
        config: changes to the model's.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": tokenizer.token_to_id("</s>")}
    rows = tokenizer.get_vocab_size() + padding
    made = transformers.LlamaConfig(vocab_size=rows, **{**sizes, **ids, "tie_word_embeddings": False, **config})
    transformers.LlamaForCausalLM(made).to(dtype).save_pretrained(folder)
    return save_tokenizer(folder, tokenizer)


def save_tokenizer(folder: Path, tokenizer: Any) -> Path:
    """Puts a tokenizer of the tokenizers library beside a model."""
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


def ids_of(folder: Path) -> dict[str, int]:
    """Every token of a saved model, with its id."""
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def rows_of(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Every token of a saved model, with its row."""
    rows = tensors_of(folder)[name]
    return {token: rows[number] for token, number in ids_of(folder).items()}
