"""Checkpoints to measure with: the shape of TinyLlama-1.1B in bfloat16, 2.2 GB each, with random weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 22, 2048, 5632, 32000, 32, 4
NUM_SHARDS = 5
FINE_TUNES = ("tune-a", "tune-b", "tune-c")
WEIGHT_STD = 0.02
DELTA_STD = 0.002  # more than a fine-tune moves weights, so that few deltas round to zero in bfloat16

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "initializer_range": WEIGHT_STD,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order a model is saved in."""
    key_value = HIDDEN // HEADS * KV_HEADS
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.weight": (key_value, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (key_value, HIDDEN),
    }
    return {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **{f"model.layers.{i}.{name}": shape for i in range(NUM_LAYERS) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }


def make_models(folder: Path) -> list[Path]:
    """Makes the base and its fine-tunes below ``folder`` unless they are there; returns their folders, base first."""
    models = [folder / name for name in ("base", *FINE_TUNES)]
    complete = folder / "complete.json"
    if complete.exists():
        return models
    for model in models:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIG, indent=2))
    names = list(tensor_shapes().items())
    per_shard = -(-len(names) // NUM_SHARDS)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for index in range(NUM_SHARDS):
        file = f"model-{index + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        part = dict(names[index * per_shard : (index + 1) * per_shard])
        weight_map |= dict.fromkeys(part, file)
        base = {name: torch.randn(shape, generator=generator).mul_(WEIGHT_STD) for name, shape in part.items()}
        _save({name: tensor.bfloat16() for name, tensor in base.items()}, models[0] / file)
        for model in models[1:]:
            tuned = {
                name: torch.randn(tensor.shape, generator=generator).mul_(DELTA_STD).add_(tensor).bfloat16()
                for name, tensor in base.items()
            }
            _save(tuned, model / file)
        print(f"made {file} of {len(models)} models", flush=True)
    total_bytes = sum(2 * torch.Size(shape).numel() for _, shape in names)
    index_text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
    for model in models:
        (model / "model.safetensors.index.json").write_text(index_text)
    complete.write_text(json.dumps({"models": [model.name for model in models], "bytes_each": total_bytes}))
    return models


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    return sorted(model.glob("*.safetensors"))


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
    data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return bool(file.stat().st_size == 8 + header_bytes + data_bytes)
