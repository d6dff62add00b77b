"""Qwen2-MoE: routed experts beside a gated shared one (Qwen Team 2024, https://qwenlm.github.io/blog/qwen-moe)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergekit_ray.architectures.moe.configs import expanded, layer_windows
from mergekit_ray.architectures.moe.family import (
    ATTENTION,
    DOWN,
    GATE,
    PACKED,
    DenseModel,
    MoeFamily,
    MoeNames,
    Wanted,
    projections,
)
from mergekit_ray.architectures.moe.registry import FAMILIES

_BLANK_ROWS = 128
"""Inner size of a shared expert that adds nothing: small, and a whole group for quantisers and parallel layers."""


@FAMILIES.register("qwen2_moe")
class Qwen2Moe(MoeFamily):
    """See the module."""

    name = "qwen2_moe"
    aliases = ("qwen", "qwen2")
    class_name = "Qwen2MoeForCausalLM"
    dense_types = ("qwen2", "llama", "mistral")
    rank = 1
    table = MoeNames(
        experts=projections("mlp.experts.{expert}"),
        residual=frozenset({DOWN}),
        router="mlp.gate.weight",
        shared=projections("mlp.shared_expert"),
        shared_gate="mlp.shared_expert_gate.weight",
        packed=PACKED,
        packed_router="mlp.gate.weight",
    )
    layer_names = ATTENTION | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    zero_biases: ClassVar[Mapping[str, str]] = {
        f"self_attn.{name}_proj.bias": f"self_attn.{name}_proj.weight" for name in "qkv"
    }

    def blank_shared_rows(self, base: DenseModel) -> int:
        """See `MoeFamily.blank_shared_rows`."""
        return min(_BLANK_ROWS, base.shape(GATE)[0])

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`."""
        config = expanded(base)
        config.pop("attention_bias", None)
        inner = config["intermediate_size"]
        return {
            **config,
            **_windows(base),
            "architectures": [self.class_name],
            "model_type": self.name,
            "num_experts": wanted.num_experts,
            "num_experts_per_tok": wanted.experts_per_token,
            "moe_intermediate_size": inner,
            "shared_expert_intermediate_size": inner if wanted.has_shared else self.blank_shared_rows(base),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "qkv_bias": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }


def _windows(base: DenseModel) -> dict[str, Any]:
    """Attention windows as the base has them, layer by layer: the classes differ in what they infer.

    Readers that do not know ``layer_types`` use windows from ``max_window_layers`` on.
    """
    windows = layer_windows(base)
    if not any(window is not None for window in windows):
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": next(window for window in windows if window is not None),
        "max_window_layers": next(layer for layer, window in enumerate(windows) if window is not None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
