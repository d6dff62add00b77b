"""`verify`: read a published model again and compare it with its manifest, its config, and itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mergekit_ray.architectures.anatomy import anatomy, language_config
from mergekit_ray.checkpoint.header import Header, read_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.record import ShardRecord, tensor_digest
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.output.destination import INDEX_FILE, RECORD_ROOT
from mergekit_ray.output.manifest import manifest_records, read_json
from mergekit_ray.storage.protocols import Source

_READ_BYTES: Final = 32 << 20
"""A multiple of every element's size, so that no element lies across two reads."""

_CONFIG_FILE: Final = "config.json"
_HIDDEN_KEYS: Final = ("hidden_size", "n_embd", "d_model")
_OTHER_WIDTH_KEYS: Final = ("word_embed_proj_dim", "embedding_size")
"""Of families whose embeddings are narrower than their layers."""

_FLOATING: Final = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2})


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How thorough to be. Sizes, headers, index and shapes are always looked at: they cost no reading of weights.

    Attributes:
        sample: digests of so many tensors, drawn at random, are compared; None for those of all tensors and files.
        seed: of the draw.
        finite: also see that no value that was read is NaN or infinite.
    """

    sample: int | None = None
    seed: int = 0
    finite: bool = False


@dataclass
class Verification:
    """What was found.

    Attributes:
        num_shards: whose size and header were compared.
        num_tensors, num_bytes: tensors that were read and compared; bytes read, headers included.
        problems: in words, each naming a file; empty if all is as the manifest says.
    """

    num_shards: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    source: Source, on_bytes: Callable[[int], None] = lambda _: None, options: VerifyOptions | None = None
) -> Verification:
    """Check sizes, headers, index, shapes and digests of a model made by mergekit-ray.

    Args:
        source: where the model is.
        on_bytes: told how many more bytes were read.
        options: how thorough to be; None for every digest.

    Raises:
        CheckpointError: there is no manifest, so there is nothing to compare with, or it is not one.
        StorageError: the store failed.
    """
    return _Verifier(source, on_bytes, options or VerifyOptions()).run()


class _Verifier:
    def __init__(self, source: Source, on_bytes: Callable[[int], None], options: VerifyOptions) -> None:
        self._source = source
        self._on_bytes = on_bytes
        self._options = options
        self._result = Verification()
        self._specs: dict[str, TensorSpec] = {}

    def run(self) -> Verification:
        records = manifest_records(self._source)
        self._check_index(records)
        self._check_strays({record.file for record in records})
        chosen = self._choose(records)
        for record in records:
            self._check_shard(record, chosen)
        if len(self._specs) == sum(len(record.tensors) for record in records):
            self._check_config()
        return self._result

    def _problem(self, file: str, what: str) -> None:
        self._result.problems.append(f"{file}: {what}")

    def _choose(self, records: list[ShardRecord]) -> frozenset[str] | None:
        """Names of the tensors to be read; None for all."""
        names = sorted(name for record in records for name in record.tensors)
        if self._options.sample is None or self._options.sample >= len(names):
            return None
        return frozenset(random.Random(self._options.seed).sample(names, self._options.sample))

    def _check_index(self, records: list[ShardRecord]) -> None:
        index = read_json(self._source, INDEX_FILE)
        if index is None:
            self._problem(INDEX_FILE, "missing, so readers do not see a model")
            return
        found = index.get("weight_map")
        weight_map = found if isinstance(found, dict) else {}
        expected = {tensor: record.file for record in records for tensor in record.tensors}
        if weight_map != expected:
            names = sorted(weight_map.keys() | expected.keys())
            first = next(name for name in names if weight_map.get(name) != expected.get(name))
            self._problem(INDEX_FILE, f"does not belong to this run, first at tensor {first!r}")

    def _check_strays(self, listed: set[str]) -> None:
        for stat in self._source.list():
            name = stat.name
            if name.endswith(".safetensors") and name not in listed and not name.startswith(f"{RECORD_ROOT}/"):
                self._problem(name, "not part of this model, and readers may load it instead")

    def _check_shard(self, record: ShardRecord, chosen: frozenset[str] | None) -> None:
        stat = self._source.stat(record.file)
        if stat is None:
            self._problem(record.file, "missing")
            return
        if stat.num_bytes != record.num_bytes:
            self._problem(record.file, f"{stat.num_bytes} bytes instead of {record.num_bytes}")
            return
        try:
            header = read_header(self._source, record.file)
        except CheckpointError as error:
            self._problem(record.file, error.what)
            return
        if set(header.tensors) != set(record.tensors):
            self._problem(record.file, "its header names other tensors than the manifest")
            return
        self._specs |= {name: spec for name, (spec, _) in header.tensors.items()}
        self._check_data(record, header, stat.version, chosen)
        self._result.num_shards += 1

    def _check_data(self, record: ShardRecord, header: Header, version: str, chosen: frozenset[str] | None) -> None:
        """Read the tensors in the order in which they lie, and compare digests."""
        whole = hashlib.sha256()
        if chosen is None:
            for data in self._read(record.file, 0, header.num_bytes, version):
                whole.update(data)
        self._result.num_bytes += header.num_bytes
        for name, (spec, location) in header.tensors.items():
            if chosen is not None and name not in chosen:
                continue
            own, is_finite = tensor_digest(), True
            for data in self._read(record.file, location.start, location.end, version):
                own.update(data)
                if chosen is None:
                    whole.update(data)
                is_finite = is_finite and not (self._options.finite and _has_non_finite(data, spec.dtype))
                self._on_bytes(len(data))
            self._note_tensor(record, spec, location, own.hexdigest(), is_finite=is_finite)
        if chosen is None and whole.hexdigest() != record.sha256:
            self._problem(record.file, "the file is not what was written (SHA-256 differs)")

    def _note_tensor(
        self, record: ShardRecord, spec: TensorSpec, location: Location, digest: str, *, is_finite: bool
    ) -> None:
        self._result.num_tensors += 1
        self._result.num_bytes += location.end - location.start
        if digest != record.tensors[spec.name]:
            self._problem(record.file, f"tensor {spec.name!r} is not what was written (XXH3-128 differs)")
        if not is_finite:
            self._problem(record.file, f"tensor {spec.name!r} holds NaN or infinite values")

    def _check_config(self) -> None:
        """See that a reader who builds the model by its config finds all layers, and an embedding that fits.

        Layers beyond those that the config counts are let pass: some families predict further tokens with them.
        """
        config = read_json(self._source, _CONFIG_FILE)
        if config is None:
            self._problem(_CONFIG_FILE, "missing, so readers do not know what the weights are of")
            return
        try:
            parts = anatomy(self._specs, config, self._source.uri)
        except CheckpointError as error:
            self._problem(_CONFIG_FILE, error.what)
            return
        inner = language_config(config)
        embedding = None if parts.embedding is None else self._specs[parts.embedding]
        if embedding is None or len(embedding.shape) != 2:
            return
        self._check_size(inner, ("vocab_size",), embedding, 0, "rows", unless=("pad_vocab_size_multiple",))
        self._check_size(inner, _HIDDEN_KEYS, embedding, 1, "columns", unless=_OTHER_WIDTH_KEYS)
        head = None if parts.head is None else self._specs.get(parts.head)
        if head is not None and len(head.shape) == 2 and head.shape != embedding.shape:
            self._problem(_CONFIG_FILE, f"head {list(head.shape)} and embedding {list(embedding.shape)} do not fit")

    def _check_size(
        self,
        config: Mapping[str, Any],
        keys: tuple[str, ...],
        spec: TensorSpec,
        dimension: int,
        word: str,
        *,
        unless: tuple[str, ...],
    ) -> None:
        key = next((key for key in keys if isinstance(config.get(key), int)), None)
        if key is None or any(config.get(other) is not None for other in unless):
            return
        if config[key] != spec.shape[dimension]:
            self._problem(
                _CONFIG_FILE, f"says {key} {config[key]}, and {spec.name!r} has {spec.shape[dimension]} {word}"
            )

    def _read(self, name: str, start: int, end: int, version: str) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_READ_BYTES, end - start)))
        for low in range(start, end, _READ_BYTES):
            part = buffer[: min(_READ_BYTES, end - low)]
            self._source.read_ranges(name, [(low, low + len(part))], [part], version=version)
            yield part


def _has_non_finite(data: memoryview, dtype: DType) -> bool:
    if dtype not in _FLOATING:
        return False
    # Only whoever asks for it pays for torch.
    import torch  # noqa: PLC0415

    from mergekit_ray.evaluation.scratch import TORCH_DTYPES  # noqa: PLC0415

    values = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype])
    if dtype in (DType.F8_E4M3, DType.F8_E5M2):
        values = values.to(torch.float32)
    return not bool(torch.isfinite(values).all())
