"""Merges two tiny models in this pod and checks the result: image, package and file system work together."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN, VOCABULARY = 8, 16
NAMES = ("first", "second")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}
SQUARE = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")


def make_model(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """A Llama of one layer with random weights."""
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.0.{name}_proj.weight": (HIDDEN, HIDDEN) for name in SQUARE} | {
        f"model.layers.0.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")
    }
    shapes |= {"model.norm.weight": (HIDDEN,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    random = np.random.default_rng(seed)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def main() -> None:
    """Exits with what is wrong, if anything is."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, second = (make_model(folder / name, seed) for seed, name in enumerate(NAMES))
        models = "".join(f"  - model: {folder / name}\n    parameters: {{weight: 0.5}}\n" for name in NAMES)
        recipe, out = folder / "recipe.yml", folder / "out"
        recipe.write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
        for command in (["merge", recipe, out, "--executor", "local"], ["mergekit-ray", "verify", out]):
            subprocess.run([str(word) for word in command], check=True)  # noqa: S603 - our own commands
        merged = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if merged.keys() != first.keys():
        sys.exit(f"wrong tensors: {sorted(merged.keys() ^ first.keys())}")
    wrong = [name for name in first if not np.allclose(merged[name], (first[name] + second[name]) / 2, atol=1e-6)]
    sys.exit(f"wrong values: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
