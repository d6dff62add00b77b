"""LoRA of all experts of a layer against float64, for every way of cutting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import ExpertLowRank, from_json, to_json
from support.memory_inputs import Inputs, evaluate
from support.references.merge import ulp

EXPERTS, OUTPUTS, INPUTS, RANK, SCALE = 5, 37, 131, 3, 0.7


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(a: torch.Tensor, b: torch.Tensor, expert: int) -> torch.Tensor:
    """By the definition of the layout: column ``k · experts + expert`` of b is the k-th of the expert."""
    total = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for k in range(RANK):
        total += torch.outer(b[:, k * EXPERTS + expert].double(), a[expert * RANK + k].double())
    return total * SCALE


def check(tree: ExpertLowRank, inputs: Inputs, exact: torch.Tensor) -> None:
    found = [
        evaluate(tree, inputs, num_threads=threads, chunk_elements=chunk, window=window)
        for threads, chunk in ((1, 1000), (2, 4097), (3, 1 << 16))
        for window in (None, 1 << 12, 2 * INPUTS + 5)
    ]
    assert all(torch.equal(each, found[0]) for each in found)
    off = np.abs(found[0].double().numpy() - exact.numpy())
    assert (off <= ulp(exact.numpy(), found[0].dtype)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("result", [DType.F32, DType.F64])
def test_all_experts(transposed: bool, result: DType) -> None:
    a, b = random(1, EXPERTS * RANK, INPUTS), random(2, OUTPUTS, RANK * EXPERTS)
    x = random(3, EXPERTS, *((INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS)), dtype=torch.bfloat16)
    inputs = Inputs()
    loads = [inputs.load("base", x), inputs.load("adapter", a, "a"), inputs.load("adapter", b, "b")]
    tree = ExpertLowRank(*loads, SCALE, EXPERTS, 0, transposed, result)
    assert tree.spec.shape == x.shape
    assert from_json(to_json(tree)) == tree
    products = [product(a, b, expert) for expert in range(EXPERTS)]
    check(tree, inputs, x.double() + torch.stack([p.t() if transposed else p for p in products]))


@pytest.mark.parametrize("expert", [0, 3, 4])
def test_one_expert(expert: int) -> None:
    a, b, x = random(1, EXPERTS * RANK, INPUTS), random(2, OUTPUTS, RANK * EXPERTS), random(3, OUTPUTS, INPUTS)
    inputs = Inputs()
    own = a[expert * RANK : (expert + 1) * RANK].contiguous()
    loads = [inputs.load("base", x), inputs.load("adapter", own, "a"), inputs.load("adapter", b, "b")]
    check(ExpertLowRank(*loads, SCALE, EXPERTS, expert), inputs, x.double() + product(a, b, expert))
