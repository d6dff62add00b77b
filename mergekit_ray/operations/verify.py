"""`verify`: read a published model again and compare it with its manifest, its config, and itself."""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.architectures.sizes import misfits
from mergekit_ray.checkpoint.header import Header, read_header
from mergekit_ray.core.arguments import check_fields, is_whole, options_or
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import STEM, index_name
from mergekit_ray.core.record import ShardRecord, tensor_digest
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.output.destination import CARD_FILE, MANIFEST_FILE
from mergekit_ray.output.manifest import Contents, FileDigest, published_contents, read_json
from mergekit_ray.storage.opening import open_source
from mergekit_ray.storage.protocols import FileStat, Source

_READ_BYTES: Final = 32 << 20
"""A multiple of every element's size, so that no element lies across two reads."""

_CONFIG_FILE: Final = "config.json"
_FLOATING: Final = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2})

_STRAYS: Final = (
    (
        # Except GGUF and ONNX, which come with many models and are read only by name, and the state of a training.
        r"(?!(training_args|optimizer|scheduler|scaler|rng_state[^/]*)\.)[^/]+\.(safetensors|bin|pt|pth|ckpt|h5|msgpack)"
        r"|[^/]+\.index(\.[^/]+)?\.json|adapter_config\.json",
        "not part of this model, and readers may load it instead",
    ),
    (r"[^/]+\.py|custom_generate/.+\.py", "not part of this model, and readers that trust its code may run it"),
    (
        r"[^/]*(config|token|vocab|merges|spiece|bpe)[^/]*\.(json|txt)|(params|tekken|modules|model_index)\.json"
        r"|[^/]+\.(model|tiktoken|jinja|spm|codes)|tokenizer\.model\..+|dict\.txt|(normalizer|emoji)\.json"
        r"|chat_template\.json|additional_chat_templates/[^/]+\.jinja",
        "not part of this model, and readers may go by it",
    ),
)
"""Files that readers find by their names, by what they do with them. Other subfolders are other models' business.

transformers merges an adapter that it finds into the model, and takes a function that generates from
``custom_generate``; vLLM and SGLang take all weights of a format, and how they are quantised from several files.
"""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How thorough to be. All but the weights is always compared, and of these sizes, headers and shapes.

    Attributes:
        sample: digests of so many tensors, drawn at random, are compared; None for those of all tensors and files.
        seed: of the draw.
        finite: also check that no value read is NaN or infinite.

    Raises:
        ConfigError: a value that none of them can have.
    """

    sample: int | None = None
    seed: int = 0
    finite: bool = False

    def __post_init__(self) -> None:
        checks = {
            "sample": (self.sample is None or is_whole(self.sample, 0), "None or a whole number from 0 on"),
            "seed": (is_whole(self.seed, -sys.maxsize), "a whole number"),
            "finite": (isinstance(self.finite, bool), "True or False"),
        }
        check_fields(self, checks)


@dataclass
class Verification:
    """What was found.

    Attributes:
        num_shards: whose size and header were compared.
        num_files: others that were read and compared.
        num_tensors, num_bytes: tensors that were read and compared; bytes read, headers included.
        problems: in words, each naming a file; empty if all is as the manifest says.
        notes: what the user should know and is no problem: an edited model card, what could not be compared.
    """

    num_shards: int = 0
    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """All is as the manifest says."""
        return not self.problems

    def __repr__(self) -> str:
        found = "all as written" if self.ok else counted(len(self.problems), "problem")
        return f"<Verification of {counted(self.num_tensors, 'tensor')}: {found}>"

    def _repr_html_(self) -> str:
        rows = {
            "shards": f"{self.num_shards:,}",
            "tensors read": f"{self.num_tensors:,}",
            "other files": f"{self.num_files:,}",
            "bytes read": format_bytes(self.num_bytes),
            "problems": "\n".join(self.problems) or "none",
            **({"notes": "\n".join(self.notes)} if self.notes else {}),
        }
        return table("Verification", rows)


def verify(
    model: str | Path | Source,
    options: VerifyOptions | None = None,
    *,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Compare every file of a model made by mergekit-ray with its manifest, and look for files that are not part of it.

    Args:
        model: its folder or URI, or the store that holds it.
        options: how thorough to be; None for every digest.
        on_bytes: called with the number of bytes just read.

    Raises:
        CheckpointError: there is no manifest, so there is nothing to compare with, or it is not one.
        StorageError: the store failed.
    """
    chosen = options_or(VerifyOptions(), options)
    source = open_source(str(model)) if isinstance(model, str | Path) else model
    return _Verifier(source, on_bytes, chosen).run()


class _Verifier:
    def __init__(self, source: Source, on_bytes: Callable[[int], None], options: VerifyOptions) -> None:
        self._source = source
        self._on_bytes = on_bytes
        self._options = options
        self._result = Verification()
        self._specs: dict[str, TensorSpec] = {}
        self._wrong: set[str] = set()

    def run(self) -> Verification:
        contents = published_contents(self._source)
        records = contents.records
        present = {stat.name: stat for stat in self._source.list()}
        if contents.is_intact is False:
            self._problem(MANIFEST_FILE, "changed after it was written (its own digest differs)")
        self._check_index(records)
        self._check_strays(contents, present)
        chosen = self._choose(records)
        for record in records:
            self._check_shard(record, chosen)
        has_config = contents.files is None or _CONFIG_FILE in contents.files
        if has_config and len(self._specs) == sum(len(record.tensors) for record in records):
            self._check_config()
        self._check_files(contents, present)
        return self._result

    def _problem(self, file: str, what: str) -> None:
        self._wrong.add(file)
        self._result.problems.append(f"{file}: {what}")

    def _read_object(self, name: str, missing: str) -> dict[str, Any] | None:
        """The object in a file; None after telling that there is none."""
        try:
            found = read_json(self._source, name)
        except CheckpointError as error:
            self._problem(name, error.what)
            return None
        if found is None:
            self._problem(name, missing)
        return found

    def _check_files(self, contents: Contents, present: Mapping[str, FileStat]) -> None:
        """Compare everything that is no shard, unless it is known to be wrong already."""
        if contents.files is None:
            self._result.notes.append(
                f"{MANIFEST_FILE} is of an earlier version and has no digests of the files beside the weights: changes "
                "in config, index and tokenizer go unnoticed"
            )
        listed: Mapping[str, FileDigest | None] = contents.files or dict.fromkeys(contents.side_files)
        for name, digest in listed.items():
            if name in self._wrong:
                continue
            what = self._difference(name, digest, present.get(name))
            if what is None:
                self._result.num_files += digest is not None
            elif name == CARD_FILE:  # people write theirs, and no reader of the weights looks at it
                self._result.notes.append(f"{name}: {what}; a model card may be edited")
            else:
                self._problem(name, what)

    def _difference(self, name: str, digest: FileDigest | None, stat: FileStat | None) -> str | None:
        if stat is None:
            return "missing"
        if digest is None:
            return None
        if stat.num_bytes != digest.num_bytes:
            return f"{stat.num_bytes} bytes instead of {digest.num_bytes}"
        found = hashlib.sha256()
        try:
            for data in self._read(name, 0, stat.num_bytes, stat.version):
                found.update(data)
        except CheckpointError as error:
            return error.what
        return None if found.hexdigest() == digest.sha256 else "not what was written (SHA-256 differs)"

    def _choose(self, records: list[ShardRecord]) -> frozenset[str] | None:
        """Names of the tensors to be read; None for all."""
        names = sorted(name for record in records for name in record.tensors)
        if self._options.sample is None or self._options.sample >= len(names):
            return None
        return frozenset(random.Random(self._options.seed).sample(names, self._options.sample))

    def _check_index(self, records: list[ShardRecord]) -> None:
        name = index_name(records[0].file if records else f"{STEM}.safetensors")
        index = self._read_object(name, "missing, so readers do not see a model")
        if index is None:
            return
        found = index.get("weight_map")
        weight_map = found if isinstance(found, dict) else {}
        expected = {tensor: record.file for record in records for tensor in record.tensors}
        if weight_map != expected:
            tensors = sorted(weight_map.keys() | expected.keys())
            first = next(tensor for tensor in tensors if weight_map.get(tensor) != expected.get(tensor))
            self._problem(name, f"does not belong to this run, first at tensor {first!r}")

    def _check_strays(self, contents: Contents, present: Iterable[str]) -> None:
        own = {
            MANIFEST_FILE,
            CARD_FILE,
            *([_CONFIG_FILE] if contents.files is None else ()),
            *contents.side_files,
            *(contents.files or ()),
        }
        own |= {name for record in contents.records for name in (record.file, index_name(record.file))}
        for name in present:
            if name in own or name.startswith("."):
                continue
            what = next((what for pattern, what in _STRAYS if re.fullmatch(pattern, name.lower())), None)
            if what is not None:
                self._problem(name, what)

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
        """Check that a reader who builds the model by its config finds all layers, and an embedding that fits.

        Layers beyond the number in the config are accepted: some families predict further tokens with them.
        """
        config = self._read_object(_CONFIG_FILE, "missing, so readers do not know what the weights are of")
        if config is None:
            return
        try:
            parts = anatomy(self._specs, config, self._source.uri)
        except CheckpointError as error:
            self._problem(_CONFIG_FILE, error.what)
            return
        for misfit in misfits(parts, self._specs, config):
            self._problem(_CONFIG_FILE, misfit)

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
