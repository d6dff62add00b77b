"""Low-rank expressions: what they read, what they need, and how they are cut."""

from __future__ import annotations

import pytest

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Expression, Load, LowRank, LowRankFactors, Merge, SingularValues, loads
from mergekit_ray.core.plan import OutputTensor
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.windows import WINDOW_BYTES, windows

ROWS, COLUMNS, RANK = 70, 100, 3


def load(model: str, *shape: int, dtype: DType = DType.BF16) -> Load:
    spec = TensorSpec(f"{model} tensor", dtype, shape)
    return Load(model, spec, Location("f", 0, spec.num_bytes))


X = load("x", ROWS, COLUMNS)
A, B = load("a", RANK, COLUMNS), load("b", ROWS, RANK)
MAGNITUDE = load("m", ROWS)


def needs(expression: Expression, start: int, stop: int) -> dict[str, tuple[int, int]]:
    return {found.model: (first, last) for found, first, last in expression.needs(start, stop)}


def windows_of(expression: Expression) -> list[tuple[int, int]]:
    spec = expression.spec
    return [(w.start, w.stop) for w in windows(OutputTensor(spec, expression, 0, spec.num_bytes))]


def test_a_run_needs_the_run_of_the_base_its_rows_of_one_factor_and_all_of_the_other() -> None:
    tree = LowRank(X, A, B, 0.5)
    assert needs(tree, 250, 470) == {"x": (250, 470), "a": (0, 300), "b": (6, 15)}
    assert tree.access is Access.ELEMENTWISE
    assert tree.spec == TensorSpec("x tensor", DType.F32, (ROWS, COLUMNS))
    assert LowRank(X, A, B, 0.5, dtype=DType.F64).spec.dtype is DType.F64


def test_norms_of_rows_need_whole_rows() -> None:
    tree = LowRank(X, A, B, 0.5, magnitude=MAGNITUDE)
    assert needs(tree, 250, 470) == {"x": (200, 500), "a": (0, 300), "b": (6, 15), "m": (2, 5)}
    assert needs(tree, 200, 500)["x"] == (200, 500)
    assert tree.access is Access.ELEMENTWISE


def test_norms_of_columns_need_the_whole_tensor() -> None:
    magnitude = load("m", COLUMNS)
    a, b = load("a", RANK, ROWS), load("b", COLUMNS, RANK)
    tree = LowRank(X, a, b, 0.5, transposed=True, magnitude=magnitude)
    assert needs(tree, 250, 470) == {"x": (0, ROWS * COLUMNS), "a": (0, 210), "b": (0, 300), "m": (0, COLUMNS)}
    assert tree.access is Access.REDUCE
    assert windows_of(tree) == [(0, ROWS * COLUMNS)]
    plain = LowRank(X, a, b, 0.5, transposed=True)
    assert needs(plain, 250, 470) == {"x": (250, 470), "a": (0, 210), "b": (0, 300)}
    assert plain.access is Access.ELEMENTWISE


def test_an_empty_tensor_needs_nothing() -> None:
    tree = LowRank(load("x", 4, 0), load("a", 1, 0), load("b", 4, 1), 1.0, magnitude=load("m", 4))
    assert needs(tree, 0, 0)["x"] == (0, 0)
    assert windows_of(tree) == []


@pytest.mark.parametrize("magnitude", [None, load("m", 16384)])
def test_a_large_tensor_is_streamed_in_windows_that_read_one_factor_again(magnitude: Load | None) -> None:
    rank = 16
    x, a, b = load("x", 16384, 8192), load("a", rank, 8192), load("b", 16384, rank)
    tree = LowRank(x, a, b, 0.5, magnitude=magnitude)
    tensor = OutputTensor(TensorSpec("w", DType.BF16, tree.spec.shape), tree, 0, 0)
    found = list(windows(tensor))
    assert len(found) > 5
    for window in found:
        assert window.memory_bytes <= 1.1 * WINDOW_BYTES
        rows = window.num_elements // 8192 + 2  # whole rows where the window begins and ends inside of them
        of_rows = rank + (0 if magnitude is None else 8192 + 1)
        base = 0 if magnitude is not None else window.num_elements
        assert window.read_bytes <= 2 * (base + rows * of_rows + rank * 8192)


def test_scratch_is_the_factors_in_float64_but_for_that_which_follows_the_rows() -> None:
    assert LowRank(X, A, B, 0.5).scratch_bytes == 8 * RANK * COLUMNS
    transposed = LowRank(X, load("a", RANK, ROWS), load("b", COLUMNS, RANK), 0.5, True)
    assert transposed.scratch_bytes == 8 * RANK * (ROWS + 2 * COLUMNS)
    nested = LowRank(LowRank(X, A, B, 0.5), A, B, 0.5)
    assert nested.scratch_bytes == 16 * RANK * COLUMNS


def test_adapters_on_one_base_share_what_they_read_of_it() -> None:
    spec = TensorSpec("w", DType.BF16, X.spec.shape)
    inputs = tuple(LowRank(X, load(f"a{i}", RANK, COLUMNS), load(f"b{i}", ROWS, RANK), 1.0) for i in range(4))
    merge = Merge("linear", spec, inputs, X, {}, ({},) * 4, ("",) * 4)
    assert [found.model for found in loads(merge)].count("x") == 1
    assert len(list(loads(merge))) == 1 + 2 * 4
    [window] = windows(OutputTensor(spec, merge, 0, spec.num_bytes))
    assert window.read_bytes == 2 * ROWS * COLUMNS + 4 * 2 * RANK * (ROWS + COLUMNS)


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_are_one_vector_with_two_norms(transposed: bool) -> None:
    tree = LowRankFactors(X, RANK, transposed, DType.BF16)
    outputs, inputs = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    assert (tree.b_shape, tree.a_shape) == ((outputs, RANK), (RANK, inputs))
    assert tree.spec == TensorSpec("x tensor", DType.F32, (RANK * (ROWS + COLUMNS) + 2,))
    assert needs(tree, 5, 6) == {"x": (0, ROWS * COLUMNS)}
    assert tree.access is Access.WHOLE
    assert tree.scratch_bytes >= 4 * ROWS * COLUMNS + 3 * 8 * ROWS * ROWS


def test_without_rank_only_the_norms_are_left() -> None:
    tree = LowRankFactors(load("x", 3, 4, 5), 0)
    assert (tree.spec.shape, tree.b_shape, tree.a_shape) == ((2,), (0, 0), (0, 0))
    assert tree.scratch_bytes == 4 * 3 * 4 * 5


def test_there_are_as_many_singular_values_as_the_short_side_is_long() -> None:
    tree = SingularValues(X)
    assert tree.spec == TensorSpec("x tensor", DType.F64, (ROWS,))
    assert needs(tree, 5, 6) == {"x": (0, ROWS * COLUMNS)}
    assert tree.access is Access.WHOLE
