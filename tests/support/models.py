"""Small checkpoints of real model families, made and saved by transformers itself, and read back by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "pad_token_id": 0,
}
"""Sizes of language models, alone or inside of multimodal ones."""


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """How transformers makes a small model of a family.

    Attributes:
        prefix: of its classes, where they are called ``<prefix>Config`` and ``<prefix>ForCausalLM``.
        changes: to `SHAPE`; None removes a key that the family does not know.
        tied: whether its published models share embedding and head.
        can_tie: whether it can be made both ways.
        config: name of the config's class where it is another.
        model: name of the model's class where it is another.
    """

    prefix: str
    changes: Mapping[str, Any]
    tied: bool = False
    can_tie: bool = True
    config: str = ""
    model: str = ""

    @property
    def config_class(self) -> Any:
        """Makes its config."""
        return getattr(transformers, self.config or f"{self.prefix}Config")

    @property
    def model_class(self) -> Any:
        """Makes a model of a config."""
        return getattr(transformers, self.model or f"{self.prefix}ForCausalLM")


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", {}),
    "mistral": Family("Mistral", {"sliding_window": 16}),
    "qwen2": Family("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, tied=True),
    "qwen3": Family("Qwen3", {"head_dim": 12}, tied=True),
    "gemma2": Family("Gemma2", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}, tied=True),
    # Phi's head has a bias, and its layers have one norm.
    "phi": Family("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}, can_tie=False),
    "gpt_neox": Family("GPTNeoX", {"num_key_value_heads": None, "rotary_pct": 0.25}, can_tie=False),
}


MOE_FAMILIES: dict[str, Family] = {
    "stablelm": Family("StableLm", {"num_key_value_heads": 4}),
    "gemma3": Family(
        "Gemma3",
        {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        tied=True,
        config="Gemma3TextConfig",
    ),
    "olmo2": Family("Olmo2", {"rope_parameters": {"rope_theta": 5e5}}),
    # It has its own words for sizes.
    "gpt2": Family(
        "GPT2",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, **dict.fromkeys(SHAPE.keys() - {"bos_token_id", "eos_token_id"})},
        tied=True,
        model="GPT2LMHeadModel",
    ),
}
"""Families that only tests of a Mixture of Experts need."""


class ModelLibrary:
    """Checkpoints by what they are, made when first asked for. Nobody may change them: copy first.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[object, ...], Path] = {}

    def get(
        self,
        family: str | Family = "llama",
        variant: int = 0,
        *,
        tied: bool | None = None,
        dtype: torch.dtype = torch.float32,
        num_layers: int = 4,
        vocab_size: int = 128,
        hidden_size: int = 32,
        max_shard_size: str = "1GB",
        with_tokenizer: bool = False,
    ) -> Path:
        """The folder of a checkpoint.

        Args:
            family: one, or the name of one in `FAMILIES` or `MOE_FAMILIES`.
            variant: 0 is the base; others are the base plus noise of this seed.
            tied: whether embedding and head are one; None for what the family does.
            dtype: of all weights.
            num_layers, vocab_size, hidden_size: its shape.
            max_shard_size: as `save_pretrained` takes it.
            with_tokenizer: save a tokenizer beside it.
        """
        key = (str(family), variant, tied, dtype, num_layers, vocab_size, hidden_size, max_shard_size, with_tokenizer)
        if key not in self._made:
            sizes = {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "hidden_size": hidden_size}
            model = build(family, variant, tied=tied, dtype=dtype, **sizes)
            name = family if isinstance(family, str) else family.prefix
            folder = self._folder / f"{name}-{variant}-{len(self._made)}"
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            if with_tokenizer:
                save_tokenizer(folder)
            self._made[key] = folder
        return self._made[key]


def build(
    family: str | Family,
    variant: int = 0,
    *,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Any:
    """A model of a family with random weights: the same for the same arguments."""
    made = (FAMILIES | MOE_FAMILIES)[family] if isinstance(family, str) else family
    values = {**SHAPE, **made.changes, **sizes}
    config = made.config_class(
        **{key: value for key, value in values.items() if value is not None},
        tie_word_embeddings=made.tied if tied is None else tied,
    )
    model = made.model_class(config).float()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(model.named_parameters()):
            # Norms and biases too: as ones and zeros they would hide mistakes.
            parameter.copy_(_noise(parameter.shape, 1_000 + number) * 0.2)
            if variant:
                parameter.add_(_noise(parameter.shape, 100_000 * variant + number), alpha=0.02)
    return model.to(dtype).eval()


def save_tokenizer(folder: Path, num_tokens: int = 10) -> None:
    """A tokenizer of a few words beside a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "capital", "of", "France", "is", "Paris"]
    words += [f"w{number}" for number in range(len(words), num_tokens)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The model in a folder as transformers loads it, which must find every weight and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert not any(report.get(key) for key in ("error_msgs", "conversion_errors")), report
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """What a model says after a fixed text longer than any sliding window here, in float32."""
    tokens = torch.arange(3, 27).reshape(1, -1)
    with torch.inference_mode():
        said: torch.Tensor = model(tokens).logits
        return said.float()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def metadata_of(folder: Path) -> list[dict[str, str]]:
    """The free-form metadata of each safetensors file of a folder."""
    result = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            result.append(opened.metadata())
    return result


def rewrite(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Add, replace or (None) remove tensors of a checkpoint that is one file."""
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    """``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by its path there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _noise(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
