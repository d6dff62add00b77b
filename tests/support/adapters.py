"""Small models, adapters made by PEFT on them, and what PEFT makes of both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from support.models import build

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYERS = 2
KINDS = ("llama", "tied", "gpt2")


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of tied weights and of embeddings that it saves, which is what is tested."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gpt2(variant: int = 0) -> Any:
    torch.manual_seed(variant)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=LAYERS, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def llama(variant: int = 0, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return build("llama", variant, tied=tied, dtype=dtype, num_hidden_layers=LAYERS, vocab_size=40)


def make_adapter(model: Any, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter with random weights in everything that is trained."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def passthrough(model: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def fresh(kind: str) -> Any:
    return gpt2() if kind == "gpt2" else llama(tied=kind == "tied")


def save_bases(folder: Path) -> dict[str, Path]:
    """A checkpoint of each kind."""
    for kind in KINDS:
        fresh(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}
