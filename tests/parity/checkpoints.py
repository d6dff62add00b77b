"""Small checkpoints that both programs merge, made by transformers with random weights in float32.

Float32 and random, so that no two magnitudes at a threshold are equal: which of equals is kept is the one thing that a
formula leaves open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),  # biases on q, k and v
    "qwen3": ("Qwen3", {"head_dim": 12}),  # norms on q and k
}
VARIANTS = ("base", "a", "b", "c")


def make_family(family: str, folder: Path) -> dict[str, Path]:
    """Saves base, a, b and c of a family below ``folder``; returns their folders by name."""
    prefix, changes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **changes})
    torch.manual_seed(1)
    base = getattr(transformers, f"{prefix}ForCausalLM")(config).float()
    places = {}
    for number, variant in enumerate(VARIANTS):
        generator = torch.Generator().manual_seed(number)
        model = base if variant == "base" else getattr(transformers, f"{prefix}ForCausalLM")(config).float()
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                # Also of the base: norms and biases start as ones and zeros, which hide mistakes.
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        places[variant] = folder / family / variant
        model.save_pretrained(places[variant])
    return places
