"""Mixtral: Llama's or Mistral's attention over routed experts (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from mergekit_ray.architectures.moe.configs import expanded, layer_windows
from mergekit_ray.architectures.moe.family import (
    ATTENTION,
    DOWN,
    GATE,
    PACKED,
    UP,
    DenseModel,
    MoeFamily,
    MoeNames,
    Wanted,
)
from mergekit_ray.architectures.moe.registry import FAMILIES

_EXPERT = "block_sparse_moe.experts.{expert}"


@FAMILIES.register("mixtral")
class Mixtral(MoeFamily):
    """See the module."""

    name = "mixtral"
    class_name = "MixtralForCausalLM"
    dense_types = ("llama", "mistral")
    rank = 0
    table = MoeNames(
        experts={GATE: f"{_EXPERT}.w1.weight", DOWN: f"{_EXPERT}.w2.weight", UP: f"{_EXPERT}.w3.weight"},
        residual=frozenset({DOWN}),
        router="block_sparse_moe.gate.weight",
        packed=PACKED,
        packed_router="mlp.gate.weight",
    )
    layer_names = ATTENTION | {"input_layernorm.weight", "post_attention_layernorm.weight"}

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`."""
        config = expanded(base)
        config.pop("attention_bias", None)
        return {
            **config,
            "architectures": [self.class_name],
            "model_type": self.name,
            "num_local_experts": wanted.num_experts,
            "num_experts_per_tok": wanted.experts_per_token,
            "sliding_window": layer_windows(base)[0] if base.anatomy.num_layers else None,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
