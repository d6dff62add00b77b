"""Shards made of expressions over small models in files, and workers to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Expression, Load, Merge
from mergekit_ray.core.plan import InputFile, InputModel, Shard
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.storage.protocols import Sink
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker
from support.memory_inputs import write_model

MIB = 1 << 20

BUDGETS = {"tiny": FIXED_BYTES + 3 * 500_000, "one byte": FIXED_BYTES + 1, "ample": FIXED_BYTES + 64 * MIB}


def make_worker(plan_inputs: dict[str, InputModel], output: Path | Sink, **options: Any) -> Worker:
    chosen = WorkerOptions(**{"memory_bytes": FIXED_BYTES + 64 * MIB, **options})
    sink = LocalStore(output) if isinstance(output, Path) else output
    return Worker(Resources(plan_inputs, open_sources(plan_inputs), chosen), sink, "records")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def big_model(folder: Path, *tensors: torch.Tensor, content: bytes | None = None) -> InputModel:
    names = [f"t{i}" for i in range(len(tensors))]
    write_model(folder, dict(zip(names, tensors, strict=True)), {})
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    stat = LocalSource(folder).stat("model.safetensors")
    assert stat is not None
    file = InputFile(stat.name, stat.num_bytes, stat.version)
    return InputModel(folder.name, f"org/{folder.name}", str(folder), {stat.name: file})


def load_of(model: InputModel, name: str) -> Load:
    spec, location = read_header(LocalSource(model.uri), "model.safetensors").tensors[name]
    return Load(model.key, spec, location)


def merged(name: str, *inputs: Load) -> Merge:
    spec = TensorSpec(name, DType.BF16, inputs[0].spec.shape)
    weights = tuple({"weight": float(i + 1)} for i in range(len(inputs)))
    return Merge("linear", spec, inputs, None, {}, weights, ("",) * len(inputs))


def shard_of(*expressions: tuple[str, Expression]) -> Shard:
    specs = [TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions]
    [shard] = partition([specs], dict(expressions), 1 << 40)
    return shard


def long_tensors(seed: int, num_elements: int = 300_000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(num_elements, generator=generator).to(torch.bfloat16)
    return [big, torch.zeros(0, 3, dtype=torch.bfloat16), torch.arange(7), torch.tensor(2.5, dtype=torch.bfloat16)]
