"""A Mixture of Experts put together by hand: a dense model of transformers with its feed-forward layers replaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.models import load


class SparseBlock(nn.Module):
    """Softmax over all experts, the k likeliest renormalised to 1; beside them, perhaps, a shared expert.

    Its parameters are called as DeepSeekMoE's are.

    Args:
        experts: feed-forward modules.
        gate: router, ``[num_experts, hidden]``.
        num_active: experts per token.
        shared: a feed-forward module that all tokens use.
        shared_gate: ``[1, hidden]``; the shared expert is multiplied by the sigmoid of its product with the token.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: torch.Tensor,
        num_active: int,
        shared: nn.Module | None = None,
        shared_gate: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(gate.shape[1], gate.shape[0], bias=False)
        self.gate.weight = nn.Parameter(gate.clone())
        if shared is not None:
            self.shared_experts = shared
        self._shared_gate = shared_gate
        self._num_active = num_active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        likelihoods = self.gate(x).softmax(-1)
        best = likelihoods.topk(self._num_active, dim=-1)
        weights = torch.zeros_like(likelihoods).scatter(-1, best.indices, best.values)
        weights = weights / weights.sum(-1, keepdim=True)
        parts = [weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        total = torch.stack(parts).sum(0)
        if hasattr(self, "shared_experts"):
            opened = 1.0 if self._shared_gate is None else torch.sigmoid(x @ self._shared_gate.T)
            total = total + opened * self.shared_experts(x)
        return total


def assemble(
    base: Path,
    experts: Sequence[Path],
    routers: Sequence[torch.Tensor],
    num_active: int,
    *,
    shared: Path | None = None,
    shared_gates: Sequence[torch.Tensor] | None = None,
    residual_scales: Sequence[float] | None = None,
    shared_scale: float = 1.0,
) -> Any:
    """The model in float32.

    Args:
        base: gives everything outside the feed-forward layers.
        experts: give theirs.
        routers: by layer.
        num_active: experts per token.
        shared: gives a shared expert's.
        shared_gates: by layer, None for one that is added as it is.
        residual_scales: factor of each expert's down projection.
        shared_scale: that of the shared expert.
    """
    model = load(base).float()
    sources = [load(path).float() for path in experts]
    shared_source = None if shared is None else load(shared).float()
    for number, layer in enumerate(model.model.layers):
        parts = [copy.deepcopy(source.model.layers[number].mlp) for source in sources]
        for part, scale in zip(parts, residual_scales or [1.0] * len(parts), strict=True):
            part.down_proj.weight.data.mul_(scale)
        common = None
        if shared_source is not None:
            common = copy.deepcopy(shared_source.model.layers[number].mlp)
            common.down_proj.weight.data.mul_(shared_scale)
        gate = None if shared_gates is None else shared_gates[number].float()
        layer.mlp = SparseBlock(parts, routers[number].float(), num_active, common, gate)
    return model.eval()
