"""LoRA against float64, for every way of cutting; and the way back, from a matrix to its factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Expression, Load, LowRank, LowRankFactors, Merge, SingularValues
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from support.memory_inputs import Inputs, evaluate
from support.references.merge import ulp

ROWS, COLUMNS = 37, 1301  # no multiple of any tile, chunk or unrolling
CUTS = [(1, 1000), (2, 4097), (3, 1 << 16)]
WINDOWS = [None, 1 << 14, 2 * COLUMNS + 5]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Adapted:
    """A base, an adapter and what float64 makes of them."""

    def __init__(
        self,
        *,
        transposed: bool = False,
        rank: int = 6,
        scale: float = 0.7,
        dora: bool = False,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.float32),
        seed: int = 0,
        result: DType = DType.F32,
    ) -> None:
        outputs, inputs = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
        self.x = random(seed, ROWS, COLUMNS, dtype=dtypes[0])
        self.a, self.b = (
            random(seed + 1, rank, inputs, dtype=dtypes[1]),
            random(seed + 2, outputs, rank, dtype=dtypes[1]),
        )
        self.m = random(seed + 3, outputs, dtype=dtypes[1]) if dora else None
        self.inputs = Inputs()
        self.loads: list[Load] = [
            self.inputs.load("base", self.x),
            self.inputs.load("adapter", self.a, "a"),
            self.inputs.load("adapter", self.b, "b"),
        ]
        magnitude = None if self.m is None else self.inputs.load("adapter", self.m, "m")
        self.tree = LowRank(*self.loads, scale, transposed, result, magnitude)
        product = (self.b.double() @ self.a.double()) * scale
        value = self.x.double() + (product.t() if transposed else product)
        if self.m is not None:
            wide = self.m.double()[None, :] if transposed else self.m.double()[:, None]
            value = value * (wide / value.norm(dim=0 if transposed else 1, keepdim=True))
        self.value: Any = value.numpy()

    def check(self, tree: Expression, **options: Any) -> torch.Tensor:
        result = evaluate(tree, self.inputs, **options)
        off = np.abs(result.double().numpy() - self.value)
        assert (off <= 0.5001 * ulp(self.value, result.dtype)).all()
        return result


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_equals_float64_rounded_once(transposed: bool, rank: int, dora: bool) -> None:
    adapted = Adapted(transposed=transposed, rank=rank, dora=dora)
    adapted.check(adapted.tree)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.float16)])
def test_dtypes_of_base_and_adapter(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    adapted = Adapted(dtypes=dtypes)
    adapted.check(adapted.tree)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_how_it_is_cut_does_not_change_a_bit(transposed: bool, dora: bool) -> None:
    adapted = Adapted(transposed=transposed, dora=dora, result=DType.F64)
    expected = evaluate(adapted.tree, adapted.inputs)
    for num_threads, chunk_elements in CUTS:
        for window in WINDOWS:
            if window is not None and transposed and dora:
                continue  # norms of columns need the whole tensor: it has one window
            cut = {"num_threads": num_threads, "chunk_elements": chunk_elements, "window": window}
            assert torch.equal(evaluate(adapted.tree, adapted.inputs, **cut), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_float64_is_within_its_rounding(transposed: bool) -> None:
    adapted = Adapted(transposed=transposed, result=DType.F64)
    result = evaluate(adapted.tree, adapted.inputs).numpy()
    np.testing.assert_allclose(result, adapted.value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_a_cast_above_it_is_within_an_ulp(dtype: DType) -> None:
    adapted = Adapted()
    result = evaluate(Cast(adapted.tree, dtype), adapted.inputs)
    assert result.dtype == TORCH_DTYPES[dtype]
    off = np.abs(result.double().numpy() - adapted.value)
    assert (off <= 0.51 * ulp(adapted.value, result.dtype)).all()


def test_two_adapters_on_one_tensor_add_up() -> None:
    first, second = Adapted(), Adapted(seed=5)
    a, b = (first.inputs.load("second", factor, name) for factor, name in ((second.a, "a"), (second.b, "b")))
    tree = LowRank(LowRank(*first.loads, 0.7, dtype=DType.F64), a, b, 0.25, dtype=DType.F64)
    result = evaluate(tree, first.inputs).numpy()
    added = 0.25 * (second.b.double() @ second.a.double()).numpy()
    np.testing.assert_allclose(result, first.value + added, rtol=1e-12, atol=1e-12)


def test_an_embedding_cut_to_its_first_rows() -> None:
    adapted = Adapted(transposed=True)
    rows = 20
    x = adapted.inputs.load("cut", adapted.x[:rows].clone())
    result = evaluate(LowRank(x, *adapted.loads[1:], 0.7, True), adapted.inputs)
    assert torch.equal(result, evaluate(adapted.tree, adapted.inputs)[:rows])


@pytest.mark.parametrize("transposed", [False, True])
def test_an_output_that_is_zero_has_no_direction_and_stays_zero(transposed: bool) -> None:
    x = random(0, 6, 5)
    x[2, :], x[:, 3] = 0, 0
    inputs = Inputs()
    outputs = 5 if transposed else 6
    zeros = torch.zeros(2, 11 - outputs), torch.zeros(outputs, 2)
    a, b = (inputs.load("adapter", factor, name) for factor, name in zip(zeros, "ab", strict=True))
    m = inputs.load("adapter", torch.full((outputs,), 3.0), "m")
    result = evaluate(LowRank(inputs.load("base", x), a, b, 1.0, transposed, DType.F32, m), inputs)
    norms = result.norm(dim=0 if transposed else 1)
    expected = [3.0, 3.0, 3.0, 0.0, 3.0] if transposed else [3.0, 3.0, 0.0, 3.0, 3.0, 3.0]
    torch.testing.assert_close(norms, torch.tensor(expected))


def test_a_scale_of_zero_is_the_base() -> None:
    adapted = Adapted(scale=0.0, dtypes=(torch.float32, torch.float32))
    assert torch.equal(evaluate(adapted.tree, adapted.inputs), adapted.x)


@pytest.mark.parametrize("compute", [DType.F32, DType.F64, DType.BF16])
def test_below_a_merge(compute: DType) -> None:
    adapted = Adapted(result=DType.F64 if compute is DType.F64 else DType.F32)
    spec = TensorSpec("w", DType.F32, (ROWS, COLUMNS))
    weights = ({"weight": 0.25}, {"weight": 0.75})
    inputs = (adapted.tree, adapted.loads[0])
    merge = Merge("linear", spec, inputs, None, {"normalize": True}, weights, ("", ""), compute)
    expected = 0.25 * adapted.value + 0.75 * adapted.x.double().numpy()
    size = np.abs(0.25 * adapted.value) + np.abs(0.75 * adapted.x.double().numpy())
    unit = {DType.F32: 2.0**-24, DType.F64: 0.0, DType.BF16: 2.0**-8}[compute]
    for options in ({}, {"num_threads": 2, "chunk_elements": 3000, "window": 1 << 14}):
        off = np.abs(evaluate(merge, adapted.inputs, **options).double().numpy() - expected)
        assert (off <= 0.51 * ulp(expected, torch.float32) + 4 * unit * size).all()


@pytest.mark.parametrize(("place", "named"), [(0, "model base, tensor 'w'"), (1, "tensor 'a'"), (2, "tensor 'b'")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(place: int, named: str, value: float) -> None:
    adapted = Adapted(dtypes=(torch.float32, torch.float32))
    adapted.inputs.data[adapted.loads[place]][7] = value
    with pytest.raises(MergeError, match=named):
        evaluate(adapted.tree, adapted.inputs, references={"base": "base", "adapter": "org/adapter"})
    assert not torch.isfinite(evaluate(adapted.tree, adapted.inputs, allow_non_finite=True)).all()


def test_a_magnitude_that_is_no_number_shows_even_where_the_output_is_zero() -> None:
    inputs = Inputs()
    zeros = [
        inputs.load("base", torch.zeros(2, 3)),
        *(inputs.load("a", torch.zeros(s), str(s)) for s in [(1, 3), (2, 1)]),
    ]
    tree = LowRank(*zeros, 1.0, magnitude=inputs.load("a", torch.tensor([1.0, float("nan")]), "m"))
    with pytest.raises(MergeError, match="tensor 'm'"):
        evaluate(tree, inputs)


def test_a_result_beyond_the_dtype_is_refused() -> None:
    adapted = Adapted(scale=1e30, dtypes=(torch.float32, torch.float32))
    with pytest.raises(MergeError, match="overflow float16"):
        evaluate(Cast(adapted.tree, DType.F16), adapted.inputs)


def test_scratch_does_not_grow_with_the_tensor() -> None:
    def buffers_after(rows: int) -> dict[torch.dtype, int]:
        inputs = Inputs()
        loads = [inputs.load("m", random(i, *s), str(i)) for i, s in enumerate([(rows, 256), (4, 256), (rows, 4)])]
        tree = LowRank(*loads, 0.5)
        pool = ComputePool(1)
        pieces = inputs.pieces(tree)
        Evaluation(tree, pieces, pool, chunk_elements=1 << 12).fill(0, rows * 256, torch.empty(rows * 256))
        assert not any(pool.scratch.mark().values())
        return pool.scratch.held_elements

    assert buffers_after(512) == buffers_after(64)


# -- the way back ------------------------------------------------------------------------------------------------------


def split(tree: LowRankFactors, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = [tree.b_shape[0] * tree.b_shape[1], tree.a_shape[0] * tree.a_shape[1], 2]
    b, a, norms = result.split(sizes)
    return b.view(tree.b_shape), a.view(tree.a_shape), norms


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_factors_are_the_best_there_are(shape: tuple[int, int], transposed: bool, dtype: DType) -> None:
    x, inputs = random(3, *shape), Inputs()
    tree = LowRankFactors(inputs.load("m", x), 7, transposed, dtype)
    b, a, norms = split(tree, evaluate(tree, inputs))
    matrix = (x.t() if transposed else x).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :7] * s[:7]) @ v[:7]
    unit = torch.finfo(TORCH_DTYPES[dtype]).eps
    assert torch.equal(b, b.to(TORCH_DTYPES[dtype]).float())
    torch.testing.assert_close(b.double() @ a.double(), best, rtol=0, atol=8 * unit * float(s[0]))
    assert float(norms[0]) == pytest.approx(float((matrix - b.double() @ a.double()).norm()), rel=1e-6)
    assert float(norms[1]) == pytest.approx(float(matrix.norm()), rel=1e-6)
    # The singular values are shared evenly.
    torch.testing.assert_close(b.double().norm(dim=0), s[:7].sqrt(), rtol=4 * unit, atol=0)
    torch.testing.assert_close(a.double().norm(dim=1), s[:7].sqrt(), rtol=4 * unit, atol=0)


def test_a_matrix_of_low_rank_is_found_again() -> None:
    x, inputs = random(0, 60, 5) @ random(1, 5, 80), Inputs()
    tree = LowRankFactors(inputs.load("m", x), 9)
    b, a, norms = split(tree, evaluate(tree, inputs))
    torch.testing.assert_close(b @ a, x, rtol=1e-5, atol=1e-5)
    assert float(norms[0] / norms[1]) < 1e-6
    assert torch.isfinite(b).all()


def test_a_zero_matrix_has_zero_factors() -> None:
    inputs = Inputs()
    tree = LowRankFactors(inputs.load("m", torch.zeros(5, 4)), 3)
    assert not evaluate(tree, inputs).any()


def test_signs_do_not_hang_on_the_solver() -> None:
    x, inputs = random(0, 30, 20), Inputs()
    tree = LowRankFactors(inputs.load("m", x), 4)
    _, a, _ = split(tree, evaluate(tree, inputs))
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


def test_norms_of_any_shape() -> None:
    x, inputs = random(0, 3, 4, 5), Inputs()
    result = evaluate(LowRankFactors(inputs.load("m", x), 0), inputs)
    assert result.tolist() == pytest.approx([float(x.double().norm())] * 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_singular_values(shape: tuple[int, int]) -> None:
    x, inputs = random(3, *shape), Inputs()
    found = evaluate(SingularValues(inputs.load("m", x)), inputs, num_threads=2, chunk_elements=100)
    torch.testing.assert_close(found, torch.linalg.svdvals(x.double()), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("kind", [lambda x: LowRankFactors(x, 2), lambda x: LowRankFactors(x, 0), SingularValues])
def test_a_matrix_with_a_nan_is_refused_by_name(kind: Any) -> None:
    x, inputs = random(0, 8, 8), Inputs()
    x[3, 3] = float("nan")
    tree = kind(inputs.load("tuned", x))
    with pytest.raises(MergeError, match="model tuned, tensor 'w'"):
        evaluate(tree, inputs)
    assert torch.isnan(evaluate(tree, inputs, allow_non_finite=True)).all()
