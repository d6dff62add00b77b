"""Shards: names, headers, offsets, boundaries."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.checkpoint.header import parse_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.partition import partition


def expression(spec: TensorSpec) -> Load:
    return Load("m0", spec, Location("f", 0, spec.num_bytes))


def cut(groups: list[list[TensorSpec]], max_bytes: int) -> tuple[Shard, ...]:
    return partition(groups, {spec.name: expression(spec) for group in groups for spec in group}, max_bytes)


def group(name: str, *sizes: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.{i}", DType.BF16, (size,)) for i, size in enumerate(sizes)]


def test_groups_stay_together_while_they_fit() -> None:
    shards = cut([group("e", 30), group("l0", 20, 20), group("l1", 20, 20), group("n", 5)], 150)
    assert [[t.spec.name for t in shard.tensors] for shard in shards] == [
        ["e.0", "l0.0", "l0.1"],
        ["l1.0", "l1.1", "n.0"],
    ]


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    shards = cut([group("a", 10), group("b", 500), group("c", 10)], 100)
    assert [[t.spec.name for t in shard.tensors] for shard in shards] == [["a.0"], ["b.0"], ["c.0"]]


SPECS = st.builds(
    lambda dtype, shape: (dtype, tuple(shape)),
    st.sampled_from([DType.BF16, DType.F32, DType.U8, DType.F64]),
    st.lists(st.integers(0, 6), max_size=3),
)


@given(st.lists(st.lists(SPECS, max_size=5), min_size=1, max_size=6), st.integers(1, 400))
def test_every_tensor_has_one_place_that_the_header_states(
    drawn: list[list[tuple[DType, tuple[int, ...]]]], max_bytes: int
) -> None:
    groups = [[TensorSpec(f"ä.{g}.{i}", *spec) for i, spec in enumerate(specs)] for g, specs in enumerate(drawn)]
    shards = cut(groups, max_bytes)
    names = [tensor.spec.name for shard in shards for tensor in shard.tensors]
    assert sorted(names) == sorted(spec.name for specs in groups for spec in specs)
    for number, shard in enumerate(shards, start=1):
        assert shard.file == f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = parse_header(shard.header, shard.num_bytes, shard.file)
        assert header.num_bytes == len(shard.header)
        assert header.num_bytes % 8 == 0
        stated = {name: (spec, place.start, place.end) for name, (spec, place) in header.tensors.items()}
        assert stated == {
            t.spec.name: (t.spec, len(shard.header) + t.start, len(shard.header) + t.end) for t in shard.tensors
        }
        offset = 0
        for tensor in shard.tensors:
            assert (tensor.start, tensor.end) == (offset, offset + tensor.spec.num_bytes)
            assert tensor.start % tensor.spec.dtype.itemsize == 0
            assert tensor.expression == expression(tensor.spec)
            offset = tensor.end
        assert offset <= max_bytes or len([t for t in shard.tensors if t.spec.num_bytes]) == 1


def test_a_size_that_is_no_size() -> None:
    with pytest.raises(ValueError, match=re.escape("max_shard_bytes must be positive")):
        cut([group("a", 1)], 0)
