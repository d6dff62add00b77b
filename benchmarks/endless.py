"""Stores for measuring without disks: checkpoints of any size made of noise, and an output that is thrown away.

    noise://8b/0       a Llama of a named shape in bfloat16; models with different last parts have different weights
    discard://name     takes everything, keeps small files and the sizes of large ones

`register` makes them known to this process.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_ray.checkpoint.index import INDEX_NAME
from mergekit_ray.checkpoint.layout import encode_header, pack, shard_names
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.protocols import FileStat, WritableBuffer
from mergekit_ray.storage.schemes import SCHEMES

MAX_FILE_BYTES = 5_000_000_000
_PERIOD_BYTES = 32 << 20
_NOISE_ELEMENTS = 1 << 16
_WEIGHT_STD = 0.02
_LOCK = threading.Lock()

NOISE_BYTES = 2 * _PERIOD_BYTES
"""What a process holds for each model of noise that it reads."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    is_tied: bool = False

    def groups(self) -> list[list[TensorSpec]]:
        """Its tensors: embedding, layers, head."""

        def spec(name: str, *shape: int) -> TensorSpec:
            return TensorSpec(name, DType.BF16, shape)

        kv = self.hidden // self.num_heads * self.num_kv_heads
        layers = [
            [
                spec(f"model.layers.{i}.input_layernorm.weight", self.hidden),
                spec(f"model.layers.{i}.mlp.down_proj.weight", self.hidden, self.intermediate),
                spec(f"model.layers.{i}.mlp.gate_proj.weight", self.intermediate, self.hidden),
                spec(f"model.layers.{i}.mlp.up_proj.weight", self.intermediate, self.hidden),
                spec(f"model.layers.{i}.post_attention_layernorm.weight", self.hidden),
                spec(f"model.layers.{i}.self_attn.k_proj.weight", kv, self.hidden),
                spec(f"model.layers.{i}.self_attn.o_proj.weight", self.hidden, self.hidden),
                spec(f"model.layers.{i}.self_attn.q_proj.weight", self.hidden, self.hidden),
                spec(f"model.layers.{i}.self_attn.v_proj.weight", kv, self.hidden),
            ]
            for i in range(self.num_layers)
        ]
        embedding = [spec("model.embed_tokens.weight", self.vocabulary, self.hidden)]
        head = [] if self.is_tied else [spec("lm_head.weight", self.vocabulary, self.hidden)]
        return [embedding, *layers, [spec("model.norm.weight", self.hidden), *head]]

    def config(self) -> dict[str, object]:
        """Its ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.is_tied,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32_000),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256),
    "70b": Shape(8192, 28_672, 80, 64, 8, 128_256),
    "wide": Shape(2048, 256, 1, 32, 4, 262_144),
    "tall": Shape(2048, 256, 1, 32, 4, 262_144, is_tied=True),
    "square": Shape(2048, 256, 1, 32, 4, 8192, is_tied=True),
    "layer": Shape(4096, 14_336, 1, 32, 8, 1024, is_tied=True),
}


@functools.lru_cache(maxsize=8)
def _noise(seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A period of normal numbers in bfloat16, twice, so that any run of up to a period is a slice of it.

    It is made in place, a little at a time: what is held besides would be taken for the worker's.
    """
    generator = np.random.default_rng(seed)
    codes = np.empty((2, _PERIOD_BYTES // 2), np.uint16)
    for start in range(0, codes.shape[1], _NOISE_ELEMENTS):
        values = generator.standard_normal(_NOISE_ELEMENTS, dtype=np.float32) * np.float32(_WEIGHT_STD)
        codes[:, start : start + _NOISE_ELEMENTS] = values.view(np.uint32) >> 16
    return codes.reshape(-1).view(np.uint8)


class NoiseSource:
    """A checkpoint of noise, read only. Its weights repeat every 32 MiB; each model has its own."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        shape_name, _, model = uri.removeprefix("noise://").partition("/")
        shape = SHAPES[shape_name]
        self._seed = sum(model.encode())
        shards = pack(shape.groups(), MAX_FILE_BYTES)
        names = shard_names(len(shards))
        self._headers = {name: encode_header(specs) for name, specs in zip(names, shards, strict=True)}
        self._sizes = {
            name: len(self._headers[name]) + sum(spec.num_bytes for spec in specs)
            for name, specs in zip(names, shards, strict=True)
        }
        weight_map = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
        self._small = {
            "config.json": json.dumps(shape.config()).encode(),
            INDEX_NAME: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        }

    @property
    def uri(self) -> str:
        """As it was opened."""
        return self._uri

    def list(self) -> list[FileStat]:
        """See `Source.list`."""
        return [stat for name in sorted({*self._small, *self._sizes}) if (stat := self.stat(name)) is not None]

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        num_bytes = len(self._small[name]) if name in self._small else self._sizes.get(name)
        return None if num_bytes is None else FileStat(name, num_bytes, "noise")

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        if name not in self._small or len(self._small[name]) > max_bytes:
            raise CheckpointError("not a small file", where=f"{self._uri}/{name}", remedy="read ranges of it")
        return self._small[name]

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        stat = self.stat(name)
        if stat is None:
            raise CheckpointError("no such file", where=f"{self._uri}/{name}", remedy="check the name")
        return self._small.get(name, self._headers.get(name, b""))[:num_bytes], stat

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""
        del version
        with _LOCK:  # threads that begin together would each make it
            noise = _noise(self._seed)
        header = len(self._headers[name])
        for (start, end), buffer in zip(ranges, buffers, strict=True):
            for low in range(start, end, _PERIOD_BYTES):
                high = min(low + _PERIOD_BYTES, end)
                place = (low - header) % _PERIOD_BYTES
                buffer[low - start : high - start] = noise[place : place + high - low].data
        return sum(end - start for start, end in ranges)


def write_noise(uri: str, folder: Path) -> None:
    """The checkpoint at a ``noise://`` URI as files in a folder."""
    source = NoiseSource(uri)
    folder.mkdir(parents=True)
    for stat in source.list():
        with (folder / stat.name).open("wb") as file:
            header, _ = source.read_head(stat.name, stat.num_bytes)
            file.write(header)
            for start in range(len(header), stat.num_bytes, _PERIOD_BYTES):
                buffer = bytearray(min(_PERIOD_BYTES, stat.num_bytes - start))
                source.read_ranges(stat.name, [(start, start + len(buffer))], [memoryview(buffer)])
                file.write(buffer)


class DiscardUpload:
    """Counts what it is given; keeps the first part, where the header is."""

    def __init__(self, sink: DiscardSink, name: str, num_bytes: int) -> None:
        self._sink, self._name, self._num_bytes = sink, name, num_bytes
        self._num_written = 0

    def write(self, data: memoryview | bytes) -> None:
        """See `Upload.write`."""
        self._num_written += memoryview(data).nbytes

    def commit(self) -> FileStat:
        """See `Upload.commit`."""
        return self._sink.note(self._name, self._num_written)

    def abort(self) -> None:
        """See `Upload.abort`."""


class DiscardSink:
    """Throws large files away. Small ones can be read back as long as the process lives."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._small: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """As it was opened."""
        return self._uri

    def note(self, name: str, num_bytes: int) -> FileStat:
        """Remember that a large file was written."""
        with self._lock:
            self._sizes[name] = num_bytes
        return FileStat(name, num_bytes, "discarded")

    def list(self) -> list[FileStat]:
        """See `Source.list`."""
        with self._lock:
            sizes = self._sizes | {name: len(data) for name, data in self._small.items()}
        return [FileStat(name, size, "discarded") for name, size in sorted(sizes.items())]

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        return next((stat for stat in self.list() if stat.name == name), None)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        data = self._small.get(name)
        if data is None or len(data) > max_bytes:
            raise CheckpointError("not kept", where=f"{self._uri}/{name}", remedy="write to a real place")
        return data

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        data = self.read(name, max_bytes=1 << 40)
        return data[:num_bytes], FileStat(name, len(data), "discarded")

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""
        del version
        data = self.read(name, max_bytes=1 << 40)
        for (start, end), buffer in zip(ranges, buffers, strict=True):
            buffer[:] = data[start:end]
        return sum(end - start for start, end in ranges)

    def open(self, name: str, num_bytes: int) -> DiscardUpload:
        """See `Sink.open`."""
        return DiscardUpload(self, name, num_bytes)

    def put(self, name: str, data: bytes) -> FileStat:
        """See `Sink.put`."""
        with self._lock:
            self._small[name] = data
        return FileStat(name, len(data), "discarded")

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Sink.put_if_absent`."""
        with self._lock:
            return self._small.setdefault(name, data) is data

    def delete(self, names: Sequence[str]) -> None:
        """See `Sink.delete`."""
        with self._lock:
            for name in names:
                self._small.pop(name, None)
                self._sizes.pop(name, None)


def register() -> None:
    """Make ``noise://`` and ``discard://`` known to this process. A name that is opened twice is the same place."""
    sinks: dict[str, DiscardSink] = {}
    SCHEMES.register("noise")(lambda uri, _revision: NoiseSource(uri))
    SCHEMES.register("discard")(lambda uri, _revision: sinks.setdefault(uri, DiscardSink(uri)))
