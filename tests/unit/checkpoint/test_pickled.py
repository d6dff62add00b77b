"""What ``torch.save`` writes is read as data: names, dtypes, shapes and places, without the tensors' bytes."""

from __future__ import annotations

import collections
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.checkpoint.header import Header
from mergekit_ray.checkpoint.pickled.reading import read_pinned_pickle
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from support.memory_source import MemorySource

DTYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.uint16: DType.U16,
    torch.uint32: DType.U32,
    torch.uint64: DType.U64,
    torch.bool: DType.BOOL,
}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def header_of(data: bytes) -> Header:
    return read_pinned_pickle(MemorySource("memory", {"x.bin": data}), "x.bin")[0]


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_reads(data: bytes, tensors: dict[str, torch.Tensor]) -> None:
    found = header_of(data).tensors
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        spec, location = found[name]
        assert (spec.name, spec.dtype, spec.shape) == (name, DTYPES[tensor.dtype], tuple(tensor.shape))
        assert data[location.start : location.end] == bytes_of(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(np.arange(12, dtype=np.float32)).reshape(3, 4).to(dtype)
    assert_reads(saved({"a": tensor, "b": tensor[1]}), {"a": tensor, "b": tensor[1]})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    assert_reads(saved(state, pickle_protocol=protocol), dict(state))


def test_parameters_views_and_shared_storages() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    state = {
        "weight": weight,
        "again": weight,
        "row": weight.data[2],
        "rows": weight.data[1:3],
        "one": weight.data[3, 2],
        "empty": weight.data[:0],
        "column": weight.data[:, :1][:1],
        "fixed": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    data = saved(state)
    assert_reads(data, {name: tensor.data for name, tensor in state.items()})
    assert header_of(data).tensors["weight"][1] == header_of(data).tensors["again"][1]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6),
    protocol=st.sampled_from([2, 4, 5]),
    ordered=st.booleans(),
)
def test_any_state(shapes: list[list[int]], protocol: int, ordered: bool) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(shape).bfloat16() for i, shape in enumerate(shapes)}
    state = collections.OrderedDict(tensors) if ordered else tensors
    assert_reads(saved(state, pickle_protocol=protocol), tensors)


def test_more_records_than_fit_the_first_read() -> None:
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((2,), float(i)) for i in range(5000)}
    assert_reads(saved(tensors), tensors)


@pytest.mark.parametrize("name", ["state_dict", "model", "whatever"])
def test_a_model_beside_other_things(name: str) -> None:
    state = {"a": torch.ones(2)}
    data = saved({name: state, "epoch": 3, "lr": 0.1, "args": {"name": "x", "list": [1, None, True]}})
    assert_reads(data, state)
    assert header_of(data).left == ("'args'", "'epoch'", "'lr'")


def test_of_several_dictionaries_the_known_one() -> None:
    state = {"a": torch.ones(2)}
    assert_reads(saved({"state_dict": state, "ema": {"a": torch.zeros(2)}}), state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "a tensor, not a dictionary"),
        ([torch.ones(2)], "a list, not a dictionary"),
        ({"a": torch.ones(2), "epoch": 3}, "beside tensors, the file holds 'epoch'"),
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(2)}}, "several dictionaries of tensors: 'a', 'b'"),
        ({"epoch": 3}, "no tensors, but 'epoch'"),
        ({3: torch.ones(2)}, "a tensor's name is '3'"),
        ({"a\nb": torch.ones(2)}, r"a tensor's name is 'a\\nb'"),
        ({"a": torch.ones(2, 3).t()}, "tensor 'a': its elements are not stored one after another"),
        ({"a": torch.ones(1).expand(4)}, "not stored one after another"),
        ({"a": torch.ones(4, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        ({"a": torch.nn.Linear(2, 2)}, r"it refers to 'torch\.nn\.modules\.linear\.Linear'"),
        ({"a": torch.ones(2).to_sparse()}, r"it refers to 'torch\._utils\._rebuild_sparse_tensor'"),
        ({"a": np.ones(2)}, "it refers to 'numpy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_holds_something_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as found:
        header_of(saved(value))
    assert found.value.remedy


def test_other_formats_are_named() -> None:
    old = saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    for data, message in (
        (old, "torch before 1.6"),
        (program.getvalue(), "a TorchScript program"),
        (b"", "no zip archive"),
        (b"GGUF" + bytes(100), "no zip archive"),
    ):
        with pytest.raises(CheckpointError, match=message):
            header_of(data)
