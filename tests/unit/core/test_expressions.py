"""Expressions: round trip through JSON text, and what they read."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, cast

import pytest
from hypothesis import given

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    Cast,
    Expression,
    Load,
    Merge,
    Rows,
    Runs,
    Scale,
    from_json,
    is_copy,
    loads,
    read_bytes,
    rows,
    substituted,
    to_json,
)
from mergekit_ray.core.tensors import Location, TensorSpec
from support.expression_trees import TREES


def load(model: str, name: str = "w", start: int = 0) -> Load:
    spec = TensorSpec(name, DType.BF16, (3, 2))
    return Load(model, spec, Location("f", start, start + spec.num_bytes))


def merge(*inputs: Expression, base: Expression | None = None) -> Merge:
    spec = TensorSpec("w", DType.F32, (3, 2))
    return Merge("linear", spec, inputs, base, {}, ({},) * len(inputs), ("",) * len(inputs))


@given(TREES)
def test_json_round_trip(tree: Expression) -> None:
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree


@pytest.mark.parametrize("data", [["rows", 1], [], ["load", "m"], ["cast", ["load"], "F32", 1]])
def test_json_of_another_kind_is_refused(data: list[object]) -> None:
    with pytest.raises(ValueError, match="not an expression"):
        from_json(data)


def test_loads_come_once_each_in_order_of_appearance_with_the_base_last() -> None:
    a, b, c, d = load("a"), load("b"), load("a", "v", 12), load("d")
    tree = merge(Cast(b, DType.F32), merge(c, a, base=b), Scale(a, 2.0, DType.F32), base=d)
    assert list(loads(tree)) == [b, c, a, d]


@given(TREES)
def test_loads_are_the_distinct_leaves(tree: Expression) -> None:
    def leaves(node: object) -> list[Load]:
        if isinstance(node, Load):
            return [node]
        below = node if isinstance(node, tuple) else [getattr(node, each.name) for each in fields(cast(Any, node))]
        return [leaf for x in below if isinstance(x, Expression | tuple) for leaf in leaves(x)]

    expected = list(dict.fromkeys((x.model, x.location.file, x.location.start, x.location.end) for x in leaves(tree)))
    found = [(x.model, x.location.file, x.location.start, x.location.end) for x in loads(tree)]
    assert found == expected


def test_specs_of_casts_and_scales_keep_name_and_shape() -> None:
    assert Cast(load("a"), DType.F16).spec == TensorSpec("w", DType.F16, (3, 2))
    assert Scale(load("a"), 0.5, DType.F32).spec == TensorSpec("w", DType.F32, (3, 2))


def test_only_a_bare_load_is_a_copy() -> None:
    assert is_copy(load("a"))
    assert not any(is_copy(x) for x in (Cast(load("a"), DType.BF16), Scale(load("a"), 1.0, DType.BF16), merge()))


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    assert TensorSpec("s", DType.F32, ()).num_bytes == 4
    assert TensorSpec("e", DType.F32, (5, 0)).num_bytes == 0
    assert Location("f", 8, 20).num_bytes == 12


@given(TREES)
def test_nothing_is_substituted_where_nothing_is_wanted(tree: Expression) -> None:
    assert substituted(tree, lambda _: None) == tree


def test_a_node_is_substituted_wherever_it_stands() -> None:
    a, b, c = load("a"), load("b"), load("c", "v")
    tree = merge(Cast(a, DType.F32), Scale(merge(b, a), 2.0, DType.F32), base=a)
    expected = merge(Cast(c, DType.F32), Scale(merge(b, c), 2.0, DType.F32), base=c)
    assert substituted(tree, lambda x: c if x == a else None) == expected
    assert substituted(a, lambda x: c if x == a else None) == c


def test_bytes_that_are_read_are_those_of_distinct_leaves_and_of_the_rows_taken() -> None:
    a, b, c, d = load("a"), load("b"), load("c", "v", 40), load("d")
    assert read_bytes(merge(Cast(a, DType.F32), merge(b, c, base=a), base=d)) == 4 * 12
    spec = TensorSpec("w", DType.BF16, (2, 2))
    picked = rows([a, Scale(merge(b, c), 2.0, DType.BF16)], spec, Runs.of([(0, 2, 1), (1, 1, 1)]))
    assert isinstance(picked, Rows)
    assert read_bytes(picked) == 3 * 4
    assert read_bytes(Cast(picked, DType.F32)) == 3 * 4
    assert read_bytes(Load("a", TensorSpec("e", DType.F32, (0, 3)), Location("f", 0, 0))) == 0


def test_equal_merged_inputs_are_kept_once_on_every_worker() -> None:
    """Also where they have travelled as JSON, and are two objects."""
    inner = merge(load("a"), load("b"))
    spec = TensorSpec("w", DType.F32, (3, 2))
    parameters = {"density": 0.5, "weight": 1.0}
    outer = Merge("ties", spec, (inner, load("c")), inner, {}, (parameters,) * 2, ("", ""))
    there = from_json(json.loads(json.dumps(to_json(outer))))
    assert isinstance(there, Merge)
    assert outer.held == there.held == (inner,)
    assert there.scratch_bytes == outer.scratch_bytes
