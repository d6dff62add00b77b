"""DeepSeekMoE, first version: routed experts beside a shared one that is not gated (Dai et al. 2024, arXiv 2401.06066).

transformers has no class for it: the code is that of DeepSeek's own repository, which ``auto_map`` names. vLLM, SGLang
and llama.cpp read the family themselves.
"""

from __future__ import annotations

from typing import Any

from mergekit_ray.architectures.moe.configs import expanded, layer_windows
from mergekit_ray.architectures.moe.family import (
    ATTENTION,
    ATTENTION_BIASES,
    DOWN,
    DenseModel,
    MoeFamily,
    MoeNames,
    Wanted,
    projections,
)
from mergekit_ray.architectures.moe.registry import FAMILIES

_CODE = "deepseek-ai/deepseek-moe-16b-base"


@FAMILIES.register("deepseek")
class DeepSeek(MoeFamily):
    """See the module."""

    name = "deepseek"
    class_name = "DeepseekForCausalLM"
    dense_types = ("llama", "mistral")
    rank = 10
    table = MoeNames(
        experts=projections("mlp.experts.{expert}"),
        residual=frozenset({DOWN}),
        router="mlp.gate.weight",
        shared=projections("mlp.shared_experts"),
    )
    layer_names = ATTENTION | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    optional_names = ATTENTION_BIASES

    def own_objections(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """See `MoeFamily.own_objections`."""
        del wanted
        found = []
        if any(window is not None for window in layer_windows(base)):
            found.append(f"has no attention windows, found one of {layer_windows(base)[0]} tokens")
        if base.shape("self_attn.q_proj.weight")[0] != base.shape(DOWN)[0]:
            found.append("has heads that fill the hidden size exactly, found another head_dim")
        return found

    def caveats(self, wanted: Wanted) -> list[str]:
        """See `MoeFamily.caveats`."""
        found = [
            f"deepseek: transformers loads the result with the code of {_CODE} (trust_remote_code), which was written "
            "for transformers 4"
        ]
        if wanted.experts_per_token == 1:
            found.append(
                "deepseek: with one expert per token, its code multiplies that expert by its probability instead of 1; "
                "experts_per_token: 2 keeps the feed-forward layers as strong as the dense model's"
            )
        return found

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`."""
        config = expanded(base)
        config.pop("sliding_window", None)
        return {
            **config,
            "architectures": [self.class_name],
            "model_type": self.name,
            "auto_map": {
                "AutoConfig": f"{_CODE}--configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{_CODE}--modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{_CODE}--modeling_deepseek.DeepseekForCausalLM",
            },
            "attention_bias": bool(ATTENTION_BIASES & base.layer_names().keys()),
            "n_routed_experts": wanted.num_experts,
            "n_shared_experts": 1 if wanted.has_shared else None,
            "num_experts_per_tok": wanted.experts_per_token,
            "moe_intermediate_size": config["intermediate_size"],
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
        }
