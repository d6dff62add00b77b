from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.checkpoint.header import parse_header
from mergekit_ray.checkpoint.layout import encode_header, in_file_order, pack, place, shard_names
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.tensors import TensorSpec

SIZES = st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=8)


def u8(name: str, num_bytes: int) -> TensorSpec:
    return TensorSpec(name, DType.U8, (num_bytes,))


def named(sizes: list[list[int]]) -> list[list[TensorSpec]]:
    return [[u8(f"{g}.{i}", size) for i, size in enumerate(group)] for g, group in enumerate(sizes)]


@given(sizes=SIZES, limit=st.integers(1, 60))
def test_packing(sizes: list[list[int]], limit: int) -> None:
    groups = named(sizes)
    shards = pack(groups, limit)
    # Every tensor once, in order.
    assert [spec for shard in shards for spec in shard] == [spec for group in groups for spec in group]
    for shard in shards:
        assert shard
        assert sum(spec.num_bytes for spec in shard) <= limit or len([s for s in shard if s.num_bytes]) == 1
    # A group that fits a shard is never cut.
    where = {spec.name: i for i, shard in enumerate(shards) for spec in shard}
    for group in groups:
        if sum(spec.num_bytes for spec in group) <= limit:
            assert len({where[spec.name] for spec in group}) <= 1


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([[4, 4], [4, 4]], 16, [[4, 4, 4, 4]]),
        ([[4, 4], [4, 4]], 15, [[4, 4], [4, 4]]),
        ([[2], [4, 4, 4], [1]], 8, [[2], [4, 4], [4, 1]]),
        ([[2], [20], [1]], 8, [[2], [20], [1]]),
        ([[2, 20, 3]], 8, [[2], [20], [3]]),
        ([[]], 8, []),
        ([], 8, []),
        ([[0]], 8, [[0]]),
    ],
)
def test_packing_by_hand(sizes: list[list[int]], limit: int, expected: list[list[int]]) -> None:
    assert [[spec.num_bytes for spec in shard] for shard in pack(named(sizes), limit)] == expected


def test_a_shard_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        pack([], 0)


@given(dtypes=st.lists(st.tuples(st.sampled_from(DType), st.integers(0, 5)), max_size=12))
def test_every_tensor_is_aligned_in_the_file(dtypes: list[tuple[DType, int]]) -> None:
    specs = in_file_order([TensorSpec(str(i), dtype, (size,)) for i, (dtype, size) in enumerate(dtypes)])
    header = encode_header(specs)
    assert len(header) % 8 == 0
    parsed = parse_header(header, len(header) + sum(spec.num_bytes for spec in specs), "f")
    assert parsed.metadata == {"format": "pt"}
    for spec, (start, end) in zip(specs, place(specs), strict=True):
        found, location = parsed.tensors[spec.name]
        assert found == spec
        assert (location.start, location.end) == (len(header) + start, len(header) + end)
        assert location.start % spec.dtype.itemsize == 0


def test_order_is_kept_among_equally_wide_tensors() -> None:
    specs = [
        TensorSpec(n, d, (1,)) for n, d in [("a", DType.BF16), ("b", DType.F32), ("c", DType.F16), ("d", DType.F32)]
    ]
    assert [spec.name for spec in in_file_order(specs)] == ["b", "d", "a", "c"]


def test_a_name_cannot_be_twice_in_a_file() -> None:
    for name in ("a", "__metadata__"):
        with pytest.raises(ValueError, match="twice"):
            encode_header([u8("a", 1), u8(name, 1)])


def test_shard_names() -> None:
    assert shard_names(0) == []
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert shard_names(100_000)[0] == "model-000001-of-100000.safetensors"
