"""FlexOlmo: OLMo 2's attention and norms over routed experts (Shi et al. 2025, arXiv 2507.07024)."""

from __future__ import annotations

from typing import Any

from mergekit_ray.architectures.moe.configs import expanded
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


@FAMILIES.register("flex_olmo")
class FlexOlmo(MoeFamily):
    """See the module."""

    name = "flex_olmo"
    aliases = ("flexolmo", "olmo2")
    class_name = "FlexOlmoForCausalLM"
    dense_types = ("olmo2",)
    rank = 3
    table = MoeNames(
        experts=projections("mlp.experts.{expert}"),
        residual=frozenset({DOWN}),
        router="mlp.gate.weight",
        packed=PACKED,
        packed_router="mlp.gate.weight",
    )
    layer_names = ATTENTION | QK_NORMS | {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
    optional_names = ATTENTION_BIASES

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`."""
        return {
            **expanded(base),
            "architectures": [self.class_name],
            "model_type": self.name,
            "attention_bias": bool(ATTENTION_BIASES & base.layer_names().keys()),
            "num_experts": wanted.num_experts,
            "num_experts_per_tok": wanted.experts_per_token,
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
