"""Small models in the layout of the first Phi-2 repositories, with modelling code of their own beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.models import save_tokenizer

WIDTH, HEADS, LAYERS, ROWS, ROTARY = 64, 4, 3, 128, 8

CONFIG_CODE = """
from transformers import PretrainedConfig


class PhiConfig(PretrainedConfig):
    model_type = "phi-msft"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

    def __init__(self, n_embd=64, n_layer=3, n_head=4, n_head_kv=None, rotary_dim=8, vocab_size=128, **more):
        self.n_embd, self.n_layer, self.n_head = n_embd, n_layer, n_head
        self.n_head_kv, self.rotary_dim, self.vocab_size = n_head_kv, rotary_dim, vocab_size
        super().__init__(**more)
"""

MODEL_CODE = '''
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_phi import PhiConfig


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)


class Mixer(nn.Module):
    """Attention: rows of queries, then of keys, then of values; the first elements of each head are rotated."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.groups = config.n_head, config.n_head_kv or config.n_head
        self.size, self.rotary = config.n_embd // config.n_head, config.rotary_dim
        self.Wqkv = nn.Linear(config.n_embd, self.size * (self.heads + 2 * self.groups))
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def rotated(self, x):
        half = torch.arange(0, self.rotary, 2, dtype=torch.float32) / self.rotary
        angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] / 10000.0**half
        sine, cosine = angles.sin(), angles.cos()
        first, second = x[..., : self.rotary].chunk(2, dim=-1)
        turned = [first * cosine - second * sine, first * sine + second * cosine, x[..., self.rotary :]]
        return torch.cat(turned, dim=-1).to(x.dtype)

    def forward(self, x):
        parts = self.Wqkv(x).split([self.size * n for n in (self.heads, self.groups, self.groups)], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        q, k = self.rotated(q), self.rotated(k)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / self.size**0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln, self.mixer, self.mlp = nn.LayerNorm(config.n_embd), Mixer(config), MLP(config)

    def forward(self, x):
        normed = self.ln(x)
        return x + self.mixer(normed) + self.mlp(normed)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln, self.linear = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.vocab_size)


class PhiPreTrainedModel(PreTrainedModel):
    config_class = PhiConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        pass


class PhiModel(PhiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embd = Embedding(config)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embd.wte


class PhiForCausalLM(PhiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer, self.lm_head = PhiModel(config), Head(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embd.wte

    def get_output_embeddings(self):
        return self.lm_head.linear

    def forward(self, input_ids=None, **_):
        states = [self.transformer.embd.wte(input_ids)]
        for block in self.transformer.h:
            states.append(block(states[-1]))
        logits = self.lm_head.linear(self.lm_head.ln(states[-1]))
        return CausalLMOutputWithPast(logits=logits, hidden_states=tuple(states))
'''


def save_phi_msft(folder: Path, seed: int, *, groups: int | None = None, **config: Any) -> Path:
    """A model with random weights in float16, a tokenizer and its code.

    Args:
        folder: where it is written.
        seed: of the weights.
        groups: heads of keys and values, None for as many as there are heads.
        config: changes to its ``config.json``.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, at: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2 + at).half()

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": noise(rows, columns), f"{name}.bias": noise(rows)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": noise(WIDTH, at=1.0), f"{name}.bias": noise(WIDTH)}

    tensors = {"transformer.embd.wte.weight": noise(ROWS, WIDTH)}
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        tensors |= norm(f"{at}.ln") | linear(f"{at}.mixer.out_proj", WIDTH, WIDTH)
        tensors |= linear(f"{at}.mixer.Wqkv", WIDTH // HEADS * (HEADS + 2 * (groups or HEADS)), WIDTH)
        tensors |= linear(f"{at}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{at}.mlp.fc2", WIDTH, 4 * WIDTH)
    tensors |= norm("lm_head.ln") | linear("lm_head.linear", ROWS, WIDTH)
    folder.mkdir(parents=True)
    save_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["PhiForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi.PhiConfig",
            "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM",
        },
        "model_type": "phi-msft",
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_head_kv": groups,
        "n_inner": None,
        "n_layer": LAYERS,
        "n_positions": 64,
        "rotary_dim": ROTARY,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    (folder / "configuration_phi.py").write_text(CONFIG_CODE)
    (folder / "modeling_phi.py").write_text(MODEL_CODE)
    return folder
