"""A Mixture of Experts over the decoder of a dense model, made by mergekit-ray (Apache-2.0).

The dense model's class, with the feed-forward module of each layer replaced by a sparse block of several of its kind:
a token goes to the ``num_experts_per_tok`` experts whose rows of the router ``gate`` fit it best, and their outputs are
added with the softmax of those experts' scores as weights. A shared expert, if there is one, is added for every token.

Load it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

# What the experts came from: its type, where its layers are, and what they call their feed-forward module.
DENSE_TYPE = "phi"
STACK = "model.layers"
BLOCK = "mlp"

DenseForCausalLM: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[DENSE_TYPE]]


class CustomMoeConfig(DenseForCausalLM.config_class):  # type: ignore[misc]  # a class that is found by name
    """The dense model's configuration, and what there is to know of the experts.

    Attributes:
        num_experts: routed experts of each layer.
        num_experts_per_tok: how many of them a token goes to.
        norm_topk_prob: the weights of a token's experts sum to 1; else they are the chosen ones of a softmax over all.
        num_shared_experts: 1 if there is an expert for every token, else 0.
    """

    model_type = f"custom_moe_{DENSE_TYPE}"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    num_shared_experts: int = 0


class SparseFeedForward(nn.Module):
    """Experts behind a router.

    Args:
        config: says how many.
        dense: a feed-forward module; it becomes the first expert, copies of it the others.
    """

    def __init__(self, config: CustomMoeConfig, dense: nn.Module) -> None:
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.shared_expert = copy.deepcopy(dense) if config.num_shared_experts else None
        copies = [copy.deepcopy(dense) for _ in range(config.num_experts - 1)]
        self.experts = nn.ModuleList([dense, *copies])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the experts make of each token: the same shape, [..., hidden]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.gate(tokens)
        wide = torch.promote_types(tokens.dtype, torch.float32)  # sums are rounded once
        best, chosen = scores.topk(self.num_active, dim=-1)
        if self.norm_topk_prob:
            weights = best.softmax(-1, dtype=wide)
        else:
            weights = scores.softmax(-1, dtype=wide).gather(-1, chosen)
        total = torch.zeros_like(tokens, dtype=wide)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                made = expert(tokens[rows]).to(wide) * weights[rows, places].unsqueeze(-1)
                total = total.index_add(0, rows, made)
        if self.shared_expert is not None:
            total = total + self.shared_expert(tokens)
        return total.to(hidden_states.dtype).reshape(hidden_states.shape)


class CustomMoeForCausalLM(DenseForCausalLM):  # type: ignore[misc]  # see above
    """The dense model with sparse feed-forward blocks."""

    config_class = CustomMoeConfig

    def __init__(self, config: CustomMoeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for layer in _layers(self):
            setattr(layer, BLOCK, SparseFeedForward(config, getattr(layer, BLOCK)))
        self.post_init()


def _take_over_names() -> None:
    """Where transformers has other names in memory than files have, have it translate as for the dense model."""
    try:
        from transformers.conversion_mapping import (  # noqa: PLC0415 - there is none before version 5
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    for known in (DenseForCausalLM.__name__, DENSE_TYPE):
        mapping = get_checkpoint_conversion_mapping(known)
        if mapping is not None:
            register_checkpoint_conversion_mapping(CustomMoeConfig.model_type, mapping, overwrite=True)
            return


_take_over_names()


def _layers(model: Any) -> Any:
    """The decoder layers, whether or not ``STACK`` begins with the name of what the head is added to."""
    inner = f"{model.base_model_prefix}."
    return model.get_submodule(STACK if inner == "." or STACK.startswith(inner) else inner + STACK)
