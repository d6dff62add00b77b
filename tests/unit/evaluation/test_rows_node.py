"""Rows in another order are what numpy takes of the whole tensor, however they are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import (
    ZEROS,
    Cast,
    Constant,
    Expression,
    Gather,
    Load,
    LowRank,
    Merge,
    Noise,
    Rows,
    Scale,
    gathered,
    rows,
)
from mergekit_ray.core.plan import OutputTensor
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.host import HostEvaluation
from mergekit_ray.evaluation.nodes.generated import NoiseNode
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.evaluation.strategy import Strategy, choose
from mergekit_ray.planning.windows import Window
from support.memory_inputs import DTYPES, Inputs, evaluate
from support.references.rows import mapping, runs_of, taken

FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]
SHAPES = [(70, 13), (70,), (1, 70), (70, 2, 3)]
"""Of parts: matrices, biases, stacks."""


def random(seed: int, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reshaped(shape: Sequence[int], num_rows: int) -> tuple[int, ...]:
    return (1, num_rows) if tuple(shape[:1]) == (1,) else (num_rows, *shape[1:])


def every_cut(expression: Expression, inputs: Inputs) -> torch.Tensor:
    """The result, seen to be the same for every cut and number of threads."""
    unit = expression.unit
    sizes = [None] if expression.access is not Access.ELEMENTWISE else [None, unit, 3 * unit, 11 * unit]
    results = [
        evaluate(expression, inputs, num_threads=threads, chunk_elements=chunk, window=size)
        for (threads, chunk), size in itertools.product([(1, 1 << 16), (1, 7), (3, 64)], sizes)
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])
    return results[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*FLOATS, DType.I64, DType.U8])
def test_a_gather_is_what_is_taken_of_its_parts(shape: tuple[int, ...], dtype: DType) -> None:
    inputs = Inputs()
    parts = [(10 * random(seed, shape, torch.float32)).to(TORCH_DTYPES[dtype]) for seed in range(3)]
    wanted = mapping(5, [70] * 3, 141)
    spec = TensorSpec("new", dtype, reshaped(shape, 141))
    tree = gathered([inputs.load(f"m{i}", part) for i, part in enumerate(parts)], spec, runs_of(wanted))
    assert isinstance(tree, Gather)
    assert torch.equal(every_cut(tree, inputs), taken(parts, wanted, spec.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ordered", [True, False])
def test_rows_are_those_of_computed_parts(shape: tuple[int, ...], dtype: DType, ordered: bool) -> None:
    """Of a tensor as stored, one that is scaled, the mean of two re-indexed ones, and a constant."""
    inputs = Inputs()
    tensors = [random(seed, shape, TORCH_DTYPES[dtype]) for seed in range(4)]
    a, b, c, d = (inputs.load(f"m{i}", x) for i, x in enumerate(tensors))
    spec = TensorSpec("mean", dtype, reshaped(shape, 70))
    swapped = gathered([c, d], spec, runs_of(mapping(8, [70, 70], 70)))
    mean = Merge("linear", spec, (swapped, d), None, {}, ({"weight": 1.0},) * 2, ("", ""))
    parts = (a, Scale(b, 0.3, dtype), mean, Constant(TensorSpec("c", dtype, reshaped(shape, 9)), 0.1))
    wanted = mapping(6, [70, 70, 70, 9], 200)
    if ordered:
        in_order = [iter(sorted(row for part, row in wanted if part == index)) for index in range(4)]
        wanted = [(part, next(in_order[part]) if part != ZEROS else 0) for part, _ in wanted]
    spec = TensorSpec("new", dtype, reshaped(shape, 200))
    tree = rows(parts, spec, runs_of(wanted))
    assert isinstance(tree, Rows)
    assert tree.access is (Access.ELEMENTWISE if ordered else Access.REDUCE)
    found = every_cut(tree, inputs)
    assert torch.equal(found, taken([evaluate(part, inputs) for part in parts], wanted, spec.shape))
    assert torch.equal(found, evaluate(Rows(parts, spec, runs_of(wanted)), inputs)), "however it was put together"


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_an_adapted_embedding(transposed: bool) -> None:
    inputs = Inputs()
    x, a, b = random(0, (50, 12)), random(1, (4, 50 if transposed else 12)), random(2, (12 if transposed else 50, 4))
    loads = [inputs.load(name, tensor) for name, tensor in zip("xab", (x, a, b), strict=True)]
    adapted = LowRank(*loads, 0.7, transposed, DType.BF16)
    added = inputs.load("added", random(3, (5, 12)))
    wanted = mapping(9, [50, 5], 80)
    tree = rows([adapted, added], TensorSpec("new", DType.BF16, (80, 12)), runs_of(wanted))
    whole = evaluate(adapted, inputs)
    assert torch.equal(every_cut(tree, inputs), taken([whole, inputs.data[added].view(5, 12)], wanted, (80, 12)))


METHODS = {
    "linear": ({}, ({"weight": 0.3}, {"weight": 0.6}), False),
    "slerp": ({"t": 0.3}, ({},), True),
    "task_arithmetic": ({}, ({"weight": 0.3}, {"weight": 0.6}), True),
    "ties": ({}, ({"weight": 0.3, "density": 0.4}, {"weight": 0.6, "density": 0.7}), True),
    "dare_ties": ({}, ({"weight": 0.3, "density": 0.4}, {"weight": 0.6, "density": 0.7}), True),
    "model_stock": ({}, ({}, {}), True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_a_merge_of_gathers_is_that_of_models_with_their_rows(method: str, dtype: DType) -> None:
    parameters, of_models, has_base = METHODS[method]
    found = []
    wanted = [mapping(seed, [70, 70], 300) for seed in range(3)]
    spec = TensorSpec("new", dtype, (300, 13))
    for is_gathered in (True, False):
        inputs = Inputs()
        leaves = []
        for index in range(len(of_models) + has_base):
            parts = [random(10 * index + i, (70, 13), TORCH_DTYPES[dtype]) for i in range(2)]
            if is_gathered:
                loads = [inputs.load(f"m{index}.{i}", part) for i, part in enumerate(parts)]
                leaves.append(gathered(loads, spec, runs_of(wanted[index])))
            else:
                leaves.append(inputs.load(f"m{index}", taken(parts, wanted[index], spec.shape)))
        base = leaves.pop() if has_base else None
        merge = Merge(method, spec, tuple(leaves), base, parameters, of_models, ("k", "l")[: len(of_models)])
        assert choose(merge, "cpu").strategy is (Strategy.TORCH if method == "ties" else Strategy.COMPILED)
        found += [evaluate(merge, inputs), by_loops(merge, inputs)]
    assert all(torch.equal(each, found[0]) for each in found)


def by_loops(expression: Expression, inputs: Inputs) -> torch.Tensor:
    out = torch.empty(expression.spec.shape, dtype=TORCH_DTYPES[expression.spec.dtype])
    pieces = {
        leaf: (piece.data.view(torch.uint8).numpy(), piece.start) for leaf, piece in inputs.pieces(expression).items()
    }
    pool = ComputePool(2)
    HostEvaluation(expression, choose(expression, "cpu"), pieces, pool).fill(0, out.view(-1).view(torch.uint8).numpy())
    pool.close()
    return out


@pytest.mark.parametrize("through", ["torch", "gather", "rows"])
def test_what_is_not_finite_is_named_where_it_is_stored(through: str) -> None:
    inputs = Inputs()
    bad = random(0, (70, 13))
    bad[33, 5] = float("inf")
    loads = [inputs.load("fine", random(1, (70, 13))), inputs.load("bad", bad, "embedding")]
    spec = TensorSpec("new", DType.BF16, (3, 13))
    tree: Expression = gathered(loads, spec, runs_of([(0, 5), (1, 33), (ZEROS, 0)]))
    if through == "torch":
        tree = Cast(tree, DType.F32)
    elif through == "rows":
        tree = Rows((tree, Scale(loads[0], 0.5, DType.BF16)), spec, runs_of([(0, 0), (0, 1), (1, 5)]))
    with pytest.raises(MergeError, match=f"inf in the input, first at flat index {33 * 13 + 5} ") as caught:
        evaluate(tree, inputs, references={"bad": "org/bad"})
    assert caught.value.where == "model org/bad, tensor 'embedding'"
    assert torch.equal(evaluate(tree, inputs, allow_non_finite=True)[1].isinf().nonzero(), torch.tensor([[5]]))


def test_rows_that_are_not_taken_may_be_anything() -> None:
    inputs = Inputs()
    bad = random(0, (70, 13))
    bad[33] = float("nan")
    part = Scale(inputs.load("bad", bad), 0.5, DType.BF16)
    tree = rows([part], TensorSpec("new", DType.BF16, (2, 13)), runs_of([(0, 34), (0, 32)]))
    assert torch.equal(evaluate(tree, inputs), bad[[34, 32]] * 0.5)


def test_scratch_does_not_grow_with_the_number_of_runs() -> None:
    inputs = Inputs()
    part = Noise(inputs.load("m", random(0, (4000, 8))), "normal", 0.5, "key", DType.BF16)
    wanted = [(0, (row * 1237) % 4000) for row in range(4000)]
    tree = rows([part], TensorSpec("new", DType.BF16, (4000, 8)), runs_of(wanted))
    pool = ComputePool(1)
    out = torch.empty(32_000, dtype=torch.bfloat16)
    Evaluation(tree, inputs.pieces(tree), pool, chunk_elements=512).fill(0, 32_000, out)
    assert sum(pool.scratch.held_elements.values()) <= 8 * 8
    assert tree.spec.dtype is DTYPES[out.dtype]


@pytest.mark.parametrize(("step", "count"), [(1, 2), (2, 2), (3, 300)])
def test_rows_of_a_part_that_lie_near_each_other_are_computed_at_once(
    step: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row, or every other; not every third, for which three times as many would be computed."""
    inputs, calls, fill = Inputs(), [], NoiseNode.fill

    def counted(node: NoiseNode, start: int, stop: int, out: torch.Tensor) -> None:
        calls.append((start, stop))
        fill(node, start, stop, out)

    a, b = random(0, (300, 8)), random(1, (900, 8))
    parts = [inputs.load("a", a), Noise(inputs.load("b", b), "normal", 0.0, "key", DType.BF16)]
    wanted = [(row % 2, row // 2 * (step if row % 2 else 1)) for row in range(600)]
    spec = TensorSpec("new", DType.BF16, (600, 8))
    tree = rows(parts, spec, runs_of(wanted))
    monkeypatch.setattr(NoiseNode, "fill", counted)
    assert torch.equal(evaluate(tree, inputs, chunk_elements=300 * 8), taken([a, b], wanted, spec.shape))
    assert len(calls) == count


def test_windows_hold_whole_rows() -> None:
    inputs = Inputs()
    load: Load = inputs.load("m", random(0, (70, 13)))
    wanted = mapping(1, [70], 70, zeros=0.0)
    tree = gathered([load], TensorSpec("new", DType.BF16, (70, 13)), runs_of(wanted))
    window = Window(OutputTensor(tree.spec, tree, 0, 70 * 26), 20, 30)
    assert window.read_bytes == 20
    assert window.input_bytes == 2 * 26
