from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_ray.checkpoint import header as header_module
from mergekit_ray.checkpoint.header import Header, parse_header, read_header, read_pinned_header
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.local.store import LocalStore

# The library's Python side cannot name these in numpy or torch everywhere; the format can hold them all.
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20).filter(lambda name: name != "__metadata__")
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(DType), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def file_of(entries: object, data_bytes: int = 0) -> bytes:
    return with_length(json.dumps(entries).encode()) + bytes(data_bytes)


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def parse(file: bytes) -> Header:
    return parse_header(file, len(file), "m.safetensors", "s3://bucket/m.safetensors")


def test_a_header_by_hand() -> None:
    text = (
        b'{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  '
    )
    header = parse(with_length(text) + bytes(16))
    begin = 8 + len(text)
    assert header.num_bytes == begin
    assert header.metadata == {}
    assert list(header.tensors.items()) == [
        ("a", (TensorSpec("a", DType.F32, ()), Location("m.safetensors", begin, begin + 4))),
        ("b", (TensorSpec("b", DType.BF16, (2, 3)), Location("m.safetensors", begin + 4, begin + 16))),
    ]


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, metadata=st.dictionaries(NAMES, NAMES, max_size=3))
def test_what_the_library_reads_is_what_we_read(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    path.write_bytes(encode_header(specs, metadata) + bytes(sum(spec.num_bytes for spec in specs)))
    header = read_header(LocalStore(path.parent), path.name)
    with safe_open(path, "np") as file:
        assert set(header.tensors) == set(file.keys())
        assert header.metadata == (file.metadata() or {})
        for name, (spec, location) in header.tensors.items():
            theirs = file.get_slice(name)
            assert list(spec.shape) == theirs.get_shape()
            assert spec.dtype.value == theirs.get_dtype()
            assert location.num_bytes == math.prod(theirs.get_shape()) * spec.dtype.itemsize


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_a_checkpoint_error_and_nothing_else(data: st.DataObject) -> None:
    specs = data.draw(SPECS)
    file = bytearray(encode_header(specs) + bytes(sum(spec.num_bytes for spec in specs)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file)))
        kind = data.draw(st.sampled_from(["overwrite", "insert", "delete", "cut"]))
        patch = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"-1", b"1e9", b"{", b"]", b'"', b"null", b"9" * 30])
        )
        if kind == "overwrite":
            file[at : at + len(patch)] = patch
        elif kind == "insert":
            file[at:at] = patch
        elif kind == "delete":
            del file[at : at + 3]
        else:
            del file[at:]
    fault = None
    header = None
    try:
        header = parse(bytes(file))
    except CheckpointError as error:
        fault = error
    if header is None:
        assert fault is not None
        assert fault.where == "s3://bucket/m.safetensors"
        str(fault).encode()
    else:
        # What passes covers the file exactly.
        covered = sum(location.num_bytes for _, location in header.tensors.values())
        assert header.num_bytes + covered == len(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    value=JSON,
    field=st.sampled_from(["dtype", "shape", "data_offsets", "entry", "metadata", "document", "extra"]),
)
def test_any_json_in_any_place_is_read_or_refused(value: Any, field: str) -> None:
    tensor = entry("F32", [2], 0, 8)
    document: Any = {"__metadata__": {"a": "b"}, "t": tensor}
    if field == "document":
        document = value
    elif field == "metadata":
        document["__metadata__"] = value
    elif field == "entry":
        document["t"] = value
    else:
        tensor[field] = value
    try:
        header = parse(file_of(document, 8))
    except CheckpointError:
        return
    assert header.tensors["t"][0] == TensorSpec("t", DType.F32, (2,))


FAULTS = {
    "too few for": b"1234567",
    "the header ends at byte 108, but the file has 10": (100).to_bytes(8, "little") + b"{}",
    "more than the 100000000 allowed": b"\xff" * 8 + b"{}",
    "does not begin with '{'": with_length(b" {}"),
    "is not valid JSON": with_length(b"{"),
    "nested too deeply": with_length(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "is not UTF-8": with_length(b'{"\xff":1}'),
    "the key 'a' occurs twice": with_length(b'{"a":1,"a":2}'),
    "the key 'dtype' occurs twice": with_length(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}    '
    ),
    "NaN is not a JSON value": with_length(b'{"a":NaN}'),
    "__metadata__ is not an object of strings": file_of({"__metadata__": {"a": 1}}),
    "'t': its entry is not an object": file_of({"t": []}),
    r"'t': missing \['data_offsets'\]": file_of({"t": {"dtype": "F32", "shape": []}}),
    r"'t': unknown fields \['x'\]": file_of({"t": entry("F32", [1], 0, 4) | {"x": 1}}, 4),
    "'t' has dtype 'F8_E8M0', which cannot be read": file_of({"t": entry("F8_E8M0", [1], 0, 1)}, 1),
    "'t' has dtype 'F4', which": file_of({"t": entry("F4", [2], 0, 1)}, 1),
    "'t' has dtype 3, which": file_of({"t": entry(3, [2], 0, 1)}, 1),
    r"'t': shape \[-1\] holds -1": file_of({"t": entry("F32", [-1], 0, 4)}, 4),
    r"'t': shape \[True\] holds True": file_of({"t": entry("F32", [True], 0, 4)}, 4),
    r"'t': shape \[1.0\] holds 1.0": file_of({"t": entry("F32", [1.0], 0, 4)}, 4),
    r"holds 9223372036854775808, which": file_of({"t": entry("F32", [2**63], 0, 4)}, 4),
    "is not a list of at most 64 sizes": file_of({"t": entry("F32", [2**62] * 100_000, 0, 4)}, 4),
    "'t': shape 4 is not a list": file_of({"t": entry("F32", 4, 0, 16)}, 16),
    "'t': data_offsets .* is not a pair": file_of({"t": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 4]}}, 4),
    "'t': data_offsets .* are reversed or negative": file_of({"t": entry("F32", [1], 4, 0)}, 4),
    r"'t': 8 bytes of data for F32\[3\], which needs 12": file_of({"t": entry("F32", [3], 0, 8)}, 8),
    "a number of .* bits": file_of({"t": entry("F32", [2**62] * 60, 0, 8)}, 8),
    "'u': its data begins at 2, inside the tensor before it": file_of(
        {"t": entry("F32", [1], 0, 4), "u": entry("F32", [1], 2, 6)}, 6
    ),
    "'u': 4 bytes before its data belong to no tensor": file_of(
        {"t": entry("F32", [1], 0, 4), "u": entry("F32", [1], 8, 12)}, 12
    ),
    "'t': its data ends at byte 8 of 4 in the file": file_of({"t": entry("F32", [2], 0, 8)}, 4),
    "2 bytes after the last tensor belong to none": file_of({"t": entry("F32", [1], 0, 4)}, 6),
    "'a.nb': its name is longer than 1000 characters, or": file_of({"a\nb": entry("F32", [1], 0, 4)}, 4),
    r"'a.u202eb': its name": file_of({"a\u202eb": entry("F32", [1], 0, 4)}, 4),
    ": its name is longer than 1000": file_of({"x" * 1001: entry("F32", [1], 0, 4)}, 4),
    "which is not valid Unicode": with_length(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}')
    + bytes(4),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named(message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(FAULTS[message])
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


def test_a_large_header_takes_a_second_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(f"layer.{i}.weight", DType.BF16, (1,)) for i in range(100)]
    store = LocalStore(tmp_path)
    stat = store.put("m.safetensors", encode_header(specs) + bytes(200))
    whole = read_pinned_header(store, "m.safetensors")
    for head_bytes in (8, 100, stat.num_bytes - 300):
        monkeypatch.setattr(header_module, "HEAD_BYTES", head_bytes)
        assert read_pinned_header(store, "m.safetensors") == whole
    assert whole[1] == stat
    assert [spec for spec, _ in whole[0].tensors.values()] == specs


def test_a_hundred_thousand_tensors_are_read() -> None:
    """Which what is not linear in their number would take hours for."""
    specs = [TensorSpec(f"model.layers.{i}.mlp.gate_proj.weight", DType.BF16, (4096, 4096)) for i in range(100_000)]
    data = encode_header(specs)
    num_bytes = len(data) + sum(spec.num_bytes for spec in specs)
    assert len(parse_header(data, num_bytes, "m.safetensors").tensors) == 100_000
