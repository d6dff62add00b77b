"""Low-rank changes of the experts of a layer, filled run by run: each is summed as `LowRankNode` sums."""

from __future__ import annotations

import torch

from mergekit_ray.core.expressions import ExpertLowRank
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, node_of, round_result
from mergekit_ray.evaluation.nodes.low_rank import add_product, add_product_by_torch
from mergekit_ray.evaluation.rounding import round_into
from mergekit_ray.evaluation.scratch import TORCH_DTYPES


@node_of(ExpertLowRank)
class ExpertLowRankNode:
    """Adds to each expert's matrix the product of its two thin ones."""

    def __init__(self, node: ExpertLowRank, compilation: Compilation, guard: Guard) -> None:
        self.spec = node.spec
        self._node = node
        self._x, self._a, self._b = (compilation.compile(child) for child in node.children())
        self._pool = compilation.pool
        self._guard = guard
        self._left = self._right = torch.empty(0)

    def prepare(self) -> None:
        """Widens the factors and puts those of one expert together."""
        for child in (self._x, self._a, self._b):
            child.prepare()
        node, (num_rows, inputs) = self._node, self._node.a.spec.shape
        outputs, width = node.b.spec.shape
        rank = width // node.num_experts
        experts = slice(node.first_expert, node.first_expert + num_rows // rank)
        a = self._whole(self._a).view(-1, rank, inputs)
        b = self._whole(self._b).view(outputs, rank, node.num_experts)[:, :, experts].permute(2, 0, 1)
        # (b @ a)ᵀ = aᵀ @ bᵀ
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if node.transposed else (b, a)
        self._left, self._right = left.contiguous(), right.contiguous()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        scratch = self._pool.scratch
        mark = scratch.mark()
        values = scratch.take(stop - start, torch.float64)
        self._x.fill(start, stop, values)
        rows, columns = self._node.matrix
        size, scale = rows * columns, float(self._node.scale)
        for expert in range(start // size, -(-stop // size)):
            first, last = max(start, expert * size), min(stop, (expert + 1) * size)
            run = values[first - start : last - start]
            left, right = self._left[expert], self._right[expert]
            if run.device.type == "cpu":
                add_product(run.numpy(), first - expert * size, left.numpy(), right.numpy(), scale)
            else:
                add_product_by_torch(run, first - expert * size, left, right, scale)
        if out.dtype.itemsize < TORCH_DTYPES[self.spec.dtype].itemsize:
            round_into(values, out, scratch)  # for a caller that computes in 16 bits: still one rounding
        else:
            round_result(values, self.spec.dtype, out, scratch, self._guard)
        scratch.release(mark)

    def _whole(self, node: Node) -> torch.Tensor:
        """All of a factor in float64, flat."""
        whole = torch.empty(node.spec.num_elements, dtype=torch.float64, device=self._pool.device)
        node.fill(0, node.spec.num_elements, whole)
        return whole
