"""Times planning: four Llama 3.1 405B models, headers made up, no weight anywhere.

    python -m benchmarks.plan_405b [--layers N] [--method NAME]

Prints the wall time of `make_plan`, of the plan's digest and of its memory projection, and how much resident memory
the process gained (peak over baseline, from the operating system), headers included.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from mergekit_ray.checkpoint.layout import pack, place, shard_names
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.make import make_plan, referenced_models
from mergekit_ray.planning.windows import comfortable_memory
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.protocols import FileStat

HIDDEN = 16384
INTERMEDIATE = 53248
NUM_HEADS = 128
NUM_KV_HEADS = 8
VOCABULARY = 128256
NUM_LAYERS = 126
MAX_SHARD_BYTES = 5_000_000_000
_HEADER_BYTES = 4096

RECIPES = {
    "linear": "merge_method: linear\n",
    "ties": "merge_method: ties\nbase_model: /models/0\nparameters: {density: 0.5}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: /models/0\nparameters: {density: 0.5}\n",
}


def layer_groups(num_layers: int) -> Iterator[list[TensorSpec]]:
    """Tensors of a Llama of the 405B shape in bfloat16: what comes first, each layer, what comes last."""

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, DType.BF16, shape)

    kv = HIDDEN // NUM_HEADS * NUM_KV_HEADS
    yield [spec("model.embed_tokens.weight", VOCABULARY, HIDDEN)]
    for i in range(num_layers):
        at = f"model.layers.{i}"
        yield [
            spec(f"{at}.input_layernorm.weight", HIDDEN),
            spec(f"{at}.mlp.down_proj.weight", HIDDEN, INTERMEDIATE),
            spec(f"{at}.mlp.gate_proj.weight", INTERMEDIATE, HIDDEN),
            spec(f"{at}.mlp.up_proj.weight", INTERMEDIATE, HIDDEN),
            spec(f"{at}.post_attention_layernorm.weight", HIDDEN),
            spec(f"{at}.self_attn.k_proj.weight", kv, HIDDEN),
            spec(f"{at}.self_attn.o_proj.weight", HIDDEN, HIDDEN),
            spec(f"{at}.self_attn.q_proj.weight", HIDDEN, HIDDEN),
            spec(f"{at}.self_attn.v_proj.weight", kv, HIDDEN),
        ]
    yield [spec("model.norm.weight", HIDDEN), spec("lm_head.weight", VOCABULARY, HIDDEN)]


def headers(path: str, num_layers: int = NUM_LAYERS) -> Checkpoint:
    """An opened checkpoint that has headers only."""
    packed = pack(list(layer_groups(num_layers)), MAX_SHARD_BYTES)
    files, tensors = {}, {}
    for file, specs in zip(shard_names(len(packed)), packed, strict=True):
        ranges = place(specs)
        for spec, (start, end) in zip(specs, ranges, strict=True):
            tensors[spec.name] = (spec, Location(file, _HEADER_BYTES + start, _HEADER_BYTES + end))
        num_bytes = _HEADER_BYTES + ranges[-1][1]
        files[file] = FileStat(file, num_bytes, f"{num_bytes}-0")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": NUM_KV_HEADS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    return Checkpoint(LocalSource(path), path, files, tensors, config, [])


def recipe(method: str, num_models: int = 4) -> DenseRecipe:
    """A merge of ``num_models`` such models with a gradient and a filter, so that every tensor's parameters differ."""
    weight = "[{filter: mlp, value: [0.1, 0.9, 0.4]}, {value: [0.3, 0.7]}]"
    models = "".join(f"- {{model: /models/{i}, parameters: {{weight: {weight}}}}}\n" for i in range(num_models))
    loaded = load_recipe(f"{RECIPES[method]}dtype: bfloat16\nmodels:\n{models}")
    assert isinstance(loaded, DenseRecipe)
    return loaded


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--method", choices=sorted(RECIPES), default="dare_ties")
    options = parser.parse_args()
    METHODS.names()  # found once per process, whatever is planned
    dense = recipe(options.method)
    gc.collect()
    baseline = peak_bytes()
    checkpoints = {ref: headers(str(ref), options.layers) for ref in referenced_models(dense)}
    began = time.perf_counter()
    plan = make_plan(dense, checkpoints)
    planned = time.perf_counter()
    digest = plan.digest
    digested = time.perf_counter()
    memory = comfortable_memory(plan)
    projected = time.perf_counter()
    gained = peak_bytes() - baseline
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    print(f"{options.method}: {len(checkpoints)} models, {plan.num_parameters:,} parameters each")
    print(f"{num_tensors} output tensors in {len(plan.shards)} shards, plan {digest[:12]}")
    print(f"{plan.read_bytes / 1e12:.2f} TB to read, {plan.num_bytes / 1e12:.2f} TB to write")
    print(f"make_plan          {planned - began:6.3f} s")
    print(f"digest             {digested - planned:6.3f} s")
    print(f"memory projection  {projected - digested:6.3f} s  ({memory / 1e6:.0f} MB per worker)")
    print(f"memory gained      {gained / 2**20:6.1f} MiB of peak resident memory")


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
