"""What a driver costs: plans of the largest models handed out to Ray actors that do nothing.

    python -m benchmarks.driver_cost [--shapes 405b 671b] [--workers 2]

405b is four Llama 3.1 405B models; 671b is two DeepSeek-V3 models in block-scaled fp8, 90 000 tensors each. Headers are
made up. Actors take a shard and answer with a record of the usual size, so that what is left is the driver's own work:
queue, submission, tracking, records. Prints its CPU time a shard (all threads of the process, Ray's among them) and its
peak resident memory, plan included.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from benchmarks import plan_405b
from benchmarks.machine import describe_machine
from benchmarks.plan_405b import peak_bytes
from mergekit_ray.checkpoint.layout import pack, place, shard_names
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.executors.driver import Job, run_shards
from mergekit_ray.executors.ray_cluster import Cluster
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.planning.make import make_plan, referenced_models
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import SilentReporter
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.worker.resources import WorkerOptions

MB = 1e6
HIDDEN, VOCABULARY, NUM_LAYERS, NUM_DENSE = 7168, 129280, 61, 3
NUM_EXPERTS, EXPERT_INNER, DENSE_INNER, BLOCK = 256, 2048, 18432, 128
MAX_FILE_BYTES = 5_000_000_000
_HEADER_BYTES = 1 << 20


def deepseek_groups() -> Iterator[list[TensorSpec]]:
    """Tensors of DeepSeek-V3: matrices of layers in fp8, each with a scale for each block of 128 x 128."""

    def scaled(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{name}.weight", DType.F8_E4M3, (rows, columns))
        yield TensorSpec(f"{name}.weight_scale_inv", DType.F32, (-(-rows // BLOCK), -(-columns // BLOCK)))

    def plain(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, DType.BF16, shape)

    def feed_forward(name: str, inner: int) -> Iterator[TensorSpec]:
        for part in ("gate_proj", "up_proj"):
            yield from scaled(f"{name}.{part}", inner, HIDDEN)
        yield from scaled(f"{name}.down_proj", HIDDEN, inner)

    yield [plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)]
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}"
        group = [
            plain(f"{at}.input_layernorm.weight", HIDDEN),
            plain(f"{at}.post_attention_layernorm.weight", HIDDEN),
            plain(f"{at}.self_attn.q_a_layernorm.weight", 1536),
            plain(f"{at}.self_attn.kv_a_layernorm.weight", 512),
            *scaled(f"{at}.self_attn.q_a_proj", 1536, HIDDEN),
            *scaled(f"{at}.self_attn.q_b_proj", 24576, 1536),
            *scaled(f"{at}.self_attn.kv_a_proj_with_mqa", 576, HIDDEN),
            *scaled(f"{at}.self_attn.kv_b_proj", 32768, 512),
            *scaled(f"{at}.self_attn.o_proj", HIDDEN, 16384),
        ]
        if layer < NUM_DENSE:
            group += feed_forward(f"{at}.mlp", DENSE_INNER)
        else:
            group.append(plain(f"{at}.mlp.gate.weight", NUM_EXPERTS, HIDDEN))
            for expert in range(NUM_EXPERTS):
                group += feed_forward(f"{at}.mlp.experts.{expert}", EXPERT_INNER)
            group += feed_forward(f"{at}.mlp.shared_experts", EXPERT_INNER)
        yield group
    yield [plain("model.norm.weight", HIDDEN), plain("lm_head.weight", VOCABULARY, HIDDEN)]


def deepseek(path: str) -> Checkpoint:
    """An opened checkpoint that has headers only."""
    packed = pack(list(deepseek_groups()), MAX_FILE_BYTES)
    files, tensors = {}, {}
    for file, specs in zip(shard_names(len(packed)), packed, strict=True):
        ranges = place(specs)
        for spec, (start, end) in zip(specs, ranges, strict=True):
            tensors[spec.name] = (spec, Location(file, _HEADER_BYTES + start, _HEADER_BYTES + end))
        files[file] = FileStat(file, _HEADER_BYTES + ranges[-1][1], "1")
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "n_routed_experts": NUM_EXPERTS,
        "first_k_dense_replace": NUM_DENSE,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
    }
    return Checkpoint(LocalSource(path), path, files, tensors, config, [])


def plan_405() -> Plan:
    """Four Llama 3.1 405B models."""
    recipe = plan_405b.recipe("dare_ties")
    return make_plan(recipe, {ref: plan_405b.headers(str(ref)) for ref in referenced_models(recipe)})


def plan_671() -> Plan:
    """Two DeepSeek-V3 models."""
    models = "".join(f"- {{model: /models/{i}, parameters: {{weight: 0.5}}}}\n" for i in range(2))
    recipe = load_recipe(f"merge_method: linear\ndtype: bfloat16\nmodels:\n{models}")
    assert isinstance(recipe, DenseRecipe)
    return make_plan(recipe, {ref: deepseek(str(ref)) for ref in referenced_models(recipe)})


PLANS: Mapping[str, Callable[[], Plan]] = {"405b": plan_405, "671b": plan_671}


class IdleWorker:
    """Answers as `executors.ray_worker.RayWorker` does, and does nothing."""

    def run(self, shard: dict[str, Any]) -> ShardRecord:
        """A record as long as a real one."""
        digests = {spec[0]: "0" * 32 for spec, *_ in shard["tensors"]}
        return ShardRecord(shard["file"], 1, "0" * 64, digests, "version")

    def node(self, version: str, jobs: list[Any]) -> str:
        """It is up."""
        del version, jobs
        return "nowhere"

    def has_read(self, file: str) -> str:
        """At once."""
        del file
        return "nowhere"

    def progress(self) -> Progress:
        """Nothing is done."""
        return Progress()

    def stop(self) -> None:
        """Nothing is to be stopped."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print(describe_machine(Path.cwd()))
    columns = ("plan", "input tensors", "output tensors", "shards", "planning s", "driver CPU ms a shard")
    print(f"| {' | '.join([*columns, 'wall ms a shard', 'peak RSS MB'])} |")
    print("|---|---|---|---|---|---|---|---|")
    ray.init(num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    for shape in arguments.shapes:
        began = time.perf_counter()
        plan = PLANS[shape]()
        planned = time.perf_counter() - began
        num_read = sum(len(list(loads(tensor.expression))) for shard in plan.shards for tensor in shard.tensors)
        job = Job(plan.inputs, "discard://nowhere", "records", WorkerOptions(memory_bytes=1, num_threads=1))
        executor = RayExecutor(Cluster(), arguments.workers, cpus_per_worker=1, worker=ray.remote(IdleWorker))
        cpu, wall = time.process_time(), time.perf_counter()
        records = run_shards(plan.shards, job, executor, SilentReporter(), threading.Event())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert len(records) == len(plan.shards)
        num_tensors = sum(len(shard.tensors) for shard in plan.shards)
        count = len(records)
        print(
            f"| {shape} | {num_read} | {num_tensors} | {count} | {planned:.1f} | {1000 * cpu / count:.1f} "
            f"| {1000 * wall / count:.1f} | {peak_bytes() / MB:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
