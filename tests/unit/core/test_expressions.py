"""Expressions: round trip through JSON text, and what they read."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, cast

import pytest
from hypothesis import given

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Expression, Load, Merge, Scale, from_json, is_copy, loads, to_json
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
