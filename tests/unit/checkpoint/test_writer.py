from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.checkpoint.layout import encode_header, in_file_order, place
from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, InternalError
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import OutputTensor, Shard
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.local.store import LocalStore


def shard_of(specs: list[TensorSpec]) -> Shard:
    specs = in_file_order(specs)
    loads = [Load("m0", spec, Location("in", 0, spec.num_bytes)) for spec in specs]
    placed = zip(specs, loads, place(specs), strict=True)
    return Shard("out.safetensors", encode_header(specs), tuple(OutputTensor(s, x, *at) for s, x, at in placed))


NUMPY = {DType.F32: np.float32, DType.F16: np.float16, DType.I64: np.int64, DType.U8: np.uint8, DType.F64: np.float64}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(sorted(NUMPY, key=lambda d: d.value)), st.lists(st.integers(0, 40), max_size=3)),
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
def test_a_shard_is_what_the_safetensors_library_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[DType, list[int]]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    shard = shard_of([TensorSpec(f"tensor {i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)])
    draw = random.Random(seed)
    data = draw.randbytes(shard.num_bytes - len(shard.header))
    with ShardWriter(LocalStore(folder), shard) as writer:
        position = 0
        while position < len(data):
            step = draw.choice([1, 100, 70_000])  # below and above what is hashed on other threads
            writer.write(data[position : position + step])
            position += step
        record = writer.finish()
    file = folder / shard.file
    assert record.num_bytes == shard.num_bytes == file.stat().st_size
    assert record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with safe_open(file, "np") as opened:
        assert set(opened.keys()) == {tensor.spec.name for tensor in shard.tensors}
        assert opened.metadata() == {"format": "pt"}
        for tensor in shard.tensors:
            part = data[tensor.start : tensor.end]
            stored = opened.get_tensor(tensor.spec.name)
            expected = np.frombuffer(part, NUMPY[tensor.spec.dtype]).reshape(tensor.spec.shape)
            assert stored.dtype == expected.dtype
            assert stored.tobytes() == expected.tobytes()
            assert stored.shape == expected.shape
            assert record.tensors[tensor.spec.name] == xxhash.xxh3_128(part).hexdigest()


def test_a_buffer_may_be_reused_at_once(tmp_path: Path) -> None:
    shard = shard_of([TensorSpec("a", DType.U8, (10_000_000,)), TensorSpec("b", DType.U8, (345,))])
    data = random.Random(0).randbytes(10_000_345)
    store = LocalStore(tmp_path)
    writer = ShardWriter(store, shard)
    buffer = bytearray(1_000_000)
    for start in range(0, len(data), len(buffer)):
        piece = data[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        writer.write(memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(len(buffer))
    record = writer.finish()
    assert record.tensors["a"] == xxhash.xxh3_128(data[:10_000_000]).hexdigest()
    assert record.tensors["b"] == xxhash.xxh3_128(data[10_000_000:]).hexdigest()
    assert record.sha256 == hashlib.sha256(shard.header + data).hexdigest()
    assert store.stat(shard.file) is not None


def test_nothing_but_exactly_the_planned_bytes_is_committed(tmp_path: Path) -> None:
    shard = shard_of([TensorSpec("a", DType.U8, (10,))])
    store = LocalStore(tmp_path)
    with ShardWriter(store, shard) as writer:
        writer.write(bytes(9))
        with pytest.raises(InternalError, match="9 bytes of tensor data came where the plan has 10"):
            writer.finish()
        with pytest.raises(InternalError, match="11 bytes"):
            writer.write(bytes(2))
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(store, shard) as writer:
        writer.write(bytes(10))
        record = writer.finish()
    assert store.stat(shard.file) is not None
    assert record.version == store.list()[0].version


def test_reading_many_ranges_of_many_files(tmp_path: Path) -> None:
    stores = {f"m{i}": LocalStore(tmp_path / str(i)) for i in range(3)}
    data = {(m, f"{f}.bin"): random.Random(f"{m}{f}").randbytes(5_000) for m in stores for f in range(4)}
    versions = {(m, f): stores[m].put(f, content).version for (m, f), content in data.items()}
    draw = random.Random(1)
    requests, expected = [], []
    for _ in range(200):
        (model, file), content = draw.choice(list(data.items()))
        start, stop = sorted(draw.choices(range(5_001), k=2))
        buffer = memoryview(bytearray(stop - start))
        requests.append(ByteRange(model, file, start, stop, versions[model, file], buffer))
        expected.append(content[start:stop])
    read_into(stores, requests)
    assert [bytes(request.buffer) for request in requests] == expected
    read_into(stores, [])
    stale = ByteRange("m0", "0.bin", 0, 1, "another version", memoryview(bytearray(1)))
    with pytest.raises(CheckpointError, match="changed"):
        read_into(stores, [*requests, stale])


def test_headers_of_written_shards_read_back(tmp_path: Path) -> None:
    shard = shard_of([TensorSpec("ü", DType.BF16, (2, 2)), TensorSpec("w", DType.F32, ())])
    with ShardWriter(LocalStore(tmp_path), shard) as writer:
        writer.write(bytes(12))
        writer.finish()
    header = read_header(LocalStore(tmp_path), shard.file)
    assert [spec for spec, _ in header.tensors.values()] == [tensor.spec for tensor in shard.tensors]
    assert header.num_bytes == len(shard.header)
