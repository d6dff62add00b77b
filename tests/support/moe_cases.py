"""Dense families as Mixtures of Experts: recipes, and merges that transformers must be able to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mergekit_ray
from support.models import Family, load, tensors_of


@dataclass(frozen=True)
class Case:
    """A dense family made into an MoE.

    Attributes:
        dense: family of the models, as `ModelLibrary.get` takes it.
        model_type: of the result.
        router: name of its router below a layer.
        class_name: what transformers loads it as.
        architecture: as the recipe says, None to have it inferred.
        shared: with a shared expert.
    """

    dense: str | Family
    model_type: str
    router: str
    class_name: str
    architecture: str | None = None
    shared: bool = False

    def recipe(self, base: Path, *experts: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A recipe with random routers."""
        named = {} if self.architecture is None else {"architecture": self.architecture}
        shared = [{"source_model": str(base), "residual_scale": 0.5}] if self.shared else None
        common = {"gate_mode": "random", "shared_experts": shared}
        return {"base_model": str(base), "experts": list(experts), **common, **named, **more}

    def routers(self, out: Path, num_layers: int = 4, name: str | None = None) -> list[torch.Tensor]:
        """The router of each layer of a result, or the tensors called ``name`` there."""
        tensors = tensors_of(out)
        return [tensors[f"model.layers.{layer}.{name or self.router}"] for layer in range(num_layers)]


MIXTRAL = Case("llama", "mixtral", "block_sparse_moe.gate.weight", "MixtralForCausalLM")
QWEN2 = Case("qwen2", "qwen2_moe", "mlp.gate.weight", "Qwen2MoeForCausalLM")
SHARED_GATE = "mlp.shared_expert_gate.weight"

CASES = {
    "mixtral of llama": MIXTRAL,
    "mixtral of mistral": Case("mistral", "mixtral", "block_sparse_moe.gate.weight", "MixtralForCausalLM"),
    "qwen2_moe of qwen2": QWEN2,
    "qwen2_moe of qwen2, shared": Case("qwen2", "qwen2_moe", QWEN2.router, QWEN2.class_name, shared=True),
    "qwen2_moe of mistral": Case("mistral", "qwen2_moe", QWEN2.router, QWEN2.class_name, "qwen2_moe"),
    "qwen2_moe of llama, shared": Case("llama", "qwen2_moe", QWEN2.router, QWEN2.class_name, shared=True),
    "qwen3_moe of qwen3": Case("qwen3", "qwen3_moe", "mlp.gate.weight", "Qwen3MoeForCausalLM"),
    "flex_olmo of olmo2": Case("olmo2", "flex_olmo", "mlp.gate.weight", "FlexOlmoForCausalLM"),
}


def expert(model: Path, **more: Any) -> dict[str, Any]:
    """An expert of a recipe."""
    return {"source_model": str(model), **more}


def merge(recipe: dict[str, Any], out: Path, load: Callable[[Path], Any] = load) -> Any:
    """The merged model as transformers loads it, with as many parameters as the plan and the files say."""
    result = mergekit_ray.merge(recipe, out)
    model = load(out)
    stored = sum(tensor.numel() for tensor in tensors_of(out).values())
    assert result.plan.num_parameters == model.num_parameters() == stored
    return model


def assert_close(found: torch.Tensor, expected: torch.Tensor, roundings: float = 64.0) -> None:
    """Equal to within a few roundings of float32 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * 2.0**-24 * float(expected.abs().max()))
