"""Qwen3-MoE: routed experts only (Qwen Team 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from mergekit_ray.architectures.moe.configs import expanded, layer_windows
from mergekit_ray.architectures.moe.family import (
    ATTENTION,
    ATTENTION_BIASES,
    DOWN,
    PACKED,
    QK_NORMS,
    DenseModel,
    MoeFamily,
    MoeNames,
    Wanted,
    projections,
)
from mergekit_ray.architectures.moe.registry import FAMILIES


@FAMILIES.register("qwen3_moe")
class Qwen3Moe(MoeFamily):
    """See the module."""

    name = "qwen3_moe"
    aliases = ("qwen3",)
    class_name = "Qwen3MoeForCausalLM"
    dense_types = ("qwen3",)
    rank = 2
    table = MoeNames(
        experts=projections("mlp.experts.{expert}"),
        residual=frozenset({DOWN}),
        router="mlp.gate.weight",
        packed=PACKED,
        packed_router="mlp.gate.weight",
    )
    layer_names = ATTENTION | QK_NORMS | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    optional_names = ATTENTION_BIASES

    def own_objections(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """See `MoeFamily.own_objections`."""
        del wanted
        windows = set(layer_windows(base))
        if len(windows) > 1:
            return ["has attention windows in all layers or in none, found them in some"]
        return []

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`."""
        config = expanded(base)
        config.pop("layer_types", None)
        config["attention_bias"] = bool(ATTENTION_BIASES & base.layer_names().keys())
        return {
            **config,
            "architectures": [self.class_name],
            "model_type": self.name,
            "num_experts": wanted.num_experts,
            "num_experts_per_tok": wanted.experts_per_token,
            "moe_intermediate_size": config["intermediate_size"],
            "use_sliding_window": any(window is not None for window in layer_windows(base)),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
