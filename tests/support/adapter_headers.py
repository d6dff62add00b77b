"""Adapters that are headers only, for tests of planning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ray.checkpoint.adapter import Adapter, open_adapter
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.tensors import TensorSpec
from support.memory_source import MemorySource


def adapter_of(
    shapes: Mapping[str, Sequence[int]], *, path: str = "/adapter", dtype: DType = DType.F32, **settings: Any
) -> Adapter:
    """An adapter of rank 2 that is headers only; names without PEFT's prefix."""
    specs = [TensorSpec(f"base_model.model.{name}", dtype, tuple(shape)) for name, shape in shapes.items()]
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **settings}
    weights = encode_header(specs) + bytes(sum(spec.num_bytes for spec in specs))
    files = {"adapter_config.json": json.dumps(content).encode(), "adapter_model.safetensors": weights}
    return open_adapter(MemorySource(path, files), path)
