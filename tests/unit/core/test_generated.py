"""Constants, literals, noise and concatenations: what they hold, what they read, what they refuse."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    Cast,
    Concat,
    Constant,
    Expression,
    Literal,
    Load,
    Merge,
    Noise,
    from_json,
    is_copy,
    loads,
    to_json,
)
from mergekit_ray.core.tensors import Location, TensorSpec


def load(model: str, num_rows: int = 3, dtype: DType = DType.BF16) -> Load:
    spec = TensorSpec("w", dtype, (num_rows, 2))
    return Load(model, spec, Location("f", 0, spec.num_bytes))


def end_to_end(*parts: Expression, dtype: DType = DType.BF16) -> Concat:
    return Concat(parts, TensorSpec("packed", dtype, (sum(part.spec.num_elements for part in parts),)))


@pytest.mark.parametrize(
    "expression",
    [
        Constant(TensorSpec("c", DType.F16, (2, 0)), -0.5),
        Literal.of(TensorSpec("l", DType.BF16, (2,)), struct.pack("<2f", 1.5, math.inf)),
        Noise(load("a"), "uniform", 0.25, "key\nwith lines", DType.BF16, DType.F64),
        end_to_end(load("a"), load("b", 0), load("c", 4)),
    ],
)
def test_json_round_trip(expression: Expression) -> None:
    assert from_json(json.loads(json.dumps(to_json(expression)))) == expression
    assert not is_copy(expression)


def test_a_literal_holds_little_endian_float32() -> None:
    data = bytes.fromhex("0000803f 000020c0")  # 1.0, -2.5
    literal = Literal.of(TensorSpec("l", DType.F32, (2,)), data)
    assert literal.data == data
    assert literal.values == "AACAPwAAIMA="


def test_leaves_read_nothing() -> None:
    leaves = [Constant(TensorSpec("c", DType.F32, (9,)), 1.0), Literal.of(TensorSpec("l", DType.F32, (1,)), b"\0" * 4)]
    for leaf in leaves:
        assert list(leaf.needs(0, leaf.spec.num_elements)) == []
        assert list(loads(leaf)) == []
        assert leaf.access is Access.ELEMENTWISE
        assert leaf.scratch_bytes == 0
        assert leaf.propagates_non_finite


def test_noise_is_elementwise_and_has_the_spec_of_its_input_in_its_own_dtype() -> None:
    noise = Noise(load("a"), "normal", 0.5, "key", DType.F32)
    assert noise.spec == TensorSpec("w", DType.F32, (3, 2))
    assert list(noise.needs(1, 4)) == [(load("a"), 1, 4)]
    assert noise.access is Access.ELEMENTWISE


@given(st.lists(st.integers(0, 4), max_size=5), st.data())
def test_a_run_of_a_concatenation_needs_what_it_touches(rows: list[int], data: st.DataObject) -> None:
    parts = [load(f"m{i}", num_rows) for i, num_rows in enumerate(rows)]
    whole = end_to_end(*parts)
    origins = [(part.model, index) for part in parts for index in range(part.spec.num_elements)]
    start = data.draw(st.integers(0, len(origins)))
    stop = data.draw(st.integers(start, len(origins)))
    found = [(x.model, index) for x, first, last in whole.needs(start, stop) for index in range(first, last)]
    assert found == origins[start:stop]
    places = [place + i for _, first, last, place in whole.overlaps(start, stop) for i in range(last - first)]
    assert places == list(range(stop - start))


def test_parts_that_share_an_input_are_made_at_one_go_so_that_it_is_read_once() -> None:
    assert end_to_end(load("a"), load("b")).access is Access.ELEMENTWISE
    assert end_to_end(load("a"), Noise(load("a"), "normal", 1.0, "k", DType.BF16)).access is Access.REDUCE
    merged = Merge("slerp", load("b").spec, (load("b"), load("c")), None, {"t": 0.5}, ({}, {}), ("", ""))
    assert end_to_end(load("a"), merged).access is Access.REDUCE


def test_a_concatenation_may_be_empty() -> None:
    empty = end_to_end()
    assert list(empty.needs(0, 0)) == []
    assert empty.access is Access.ELEMENTWISE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise(load("a"), "cauchy", 1.0, "k", DType.F32), "unknown distribution 'cauchy'; accepted: normal"),
        (lambda: Noise(load("a"), "normal", -1.0, "k", DType.F32), "finite and not negative, found -1.0"),
        (lambda: Noise(load("a"), "normal", math.nan, "k", DType.F32), "finite and not negative, found nan"),
        (lambda: Noise(load("a"), "normal", math.inf, "k", DType.F32), "finite and not negative, found inf"),
        (lambda: Constant(TensorSpec("c", DType.F32, ()), math.nan), "a constant is finite, found nan"),
        (lambda: Literal(TensorSpec("l", DType.F32, (2,)), "AAAA"), "'l' takes 8 bytes of float32 values, found 3"),
        (lambda: Literal(TensorSpec("l", DType.F32, (2,)), "not base64!"), "base64"),
        (
            lambda: Concat((load("a"),), TensorSpec("p", DType.BF16, (5,))),
            "'p' has 5 elements, its parts have 6",
        ),
        (
            lambda: Concat((Cast(load("a"), DType.F32),), TensorSpec("p", DType.BF16, (6,))),
            "'p' is BF16, and not all of its parts are",
        ),
    ],
)
def test_what_makes_no_tensor_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_json_of_what_is_refused_is_refused() -> None:
    with pytest.raises(ValueError, match="not an expression: \\['constant'\\]: a constant is finite"):
        from_json(["constant", ["c", "F32", []], math.inf])
