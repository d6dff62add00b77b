"""Loads of tensors in memory, and plans over checkpoints written to a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import ZEROS, Expression, Gather, Load, Stored, needed
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.nodes.base import Piece
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES

DTYPES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}


class Inputs:
    """Tensors as if they lay in files: `load` names one, `pieces` cuts windows out of all."""

    def __init__(self) -> None:
        self.data: dict[Load, torch.Tensor] = {}

    def load(self, model: str, data: torch.Tensor, name: str = "w") -> Load:
        spec = TensorSpec(name, DTYPES[data.dtype], tuple(data.shape))
        load = Load(model, spec, Location(f"{name}.safetensors", 0, spec.num_bytes))
        self.data[load] = data.reshape(-1)
        return load

    def pieces(self, expression: Expression, start: int = 0, stop: int | None = None) -> dict[Stored, Piece]:
        """What a window of the result needs, as a worker would read it."""
        runs = needed(expression, start, expression.spec.num_elements if stop is None else stop)
        return {leaf: Piece(self.values(leaf)[low:high].clone(), low) for leaf, (low, high) in runs.items()}

    def values(self, leaf: Stored) -> torch.Tensor:
        """All elements of what is read, 1-D."""
        if isinstance(leaf, Load):
            return self.data[leaf] if leaf in self.data else self._part(leaf)
        assert isinstance(leaf, Gather)
        size = leaf.row_elements
        rows = []
        for part, first, count in leaf.runs:
            zeros = torch.zeros(count * size, dtype=TORCH_DTYPES[leaf.spec.dtype])
            whole = zeros if part == ZEROS else self.values(leaf.parts[part])[first * size : (first + count) * size]
            rows.append(whole)
        return torch.cat(rows)

    def _part(self, load: Load) -> torch.Tensor:
        """Some of the elements of a tensor."""
        place = load.location
        for whole, data in self.data.items():
            start = (place.start - whole.location.start) // load.spec.dtype.itemsize
            is_same_file = (whole.model, whole.location.file) == (load.model, place.file)
            if is_same_file and whole.location.start <= place.start and place.end <= whole.location.end:
                return data[start : start + load.spec.num_elements]
        raise KeyError(load)


def evaluate(
    expression: Expression,
    inputs: Inputs,
    *,
    num_threads: int = 1,
    chunk_elements: int = 1 << 16,
    window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The whole result, window by window if its expression may be cut."""
    spec = expression.spec
    out = torch.empty(spec.num_elements, dtype=TORCH_DTYPES[spec.dtype])
    step = window or max(1, spec.num_elements)
    pool = ComputePool(num_threads)
    try:
        for start in range(0, spec.num_elements, step):
            stop = min(start + step, spec.num_elements)
            evaluation = Evaluation(
                expression, inputs.pieces(expression, start, stop), pool, chunk_elements=chunk_elements, **options
            )
            evaluation.fill(start, stop, out[start:stop])
    finally:
        pool.close()
    return out.view(spec.shape)


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], **side: str) -> Path:
    """A checkpoint of one file, written by the safetensors library."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    for name, text in side.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def random_llama(seed: int, num_layers: int = 2, hidden: int = 8, dtype: DType = DType.BF16) -> dict[str, torch.Tensor]:
    """Random tensors named like those of a Llama."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype])

    tensors = {"model.embed_tokens.weight": make(20, hidden)}
    for i in range(num_layers):
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] = make(hidden, hidden)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = make(hidden)
    tensors["model.norm.weight"] = make(hidden)
    tensors["lm_head.weight"] = make(20, hidden)
    return tensors
