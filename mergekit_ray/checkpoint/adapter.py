"""Opening a LoRA adapter as PEFT saves it: from a store to its factors and what scales them, by headers alone.

    adapter_config.json            rank, alpha, patterns, and which variant of LoRA it is
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight and so on; or several files and an index,
                                   or adapter_model.bin

Source of the format: https://huggingface.co/docs/peft/developer_guides/checkpoint. What the values mean is defined by
what PEFT's ``merge_and_unload`` makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

from mergekit_ray.checkpoint.adapter_config import ADAPTER_CONFIG_NAME, AdapterConfig, parse_adapter_config
from mergekit_ray.checkpoint.index import MAX_INDEX_BYTES, parse_index
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import is_tokenizer_file, is_vocabulary_file
from mergekit_ray.checkpoint.weight_files import read_weight_header
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.protocols import FileStat, LinkedSource, Source

WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLED_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

_MAX_CONFIG_BYTES = 16 << 20
_NUM_THREADS = 16
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?P<rest>(\.[^.]+){0,2})"
)
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_COPY_OF_BASE = ".original_module."
_SAVED = ".modules_to_save."
_WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)|\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")


@dataclass(slots=True)
class Change:
    """What the adapter does to one module (a linear layer or an embedding); names of its stored tensors.

    Attributes:
        a, b: the factors.
        bias: added to the module's bias, scaled like the product (``lora_bias``).
        magnitude: norms of the module's outputs (DoRA).
        is_embedding: the factors are those of an embedding: ``a`` is ``[rank, vocabulary]``.
    """

    a: str | None = None
    b: str | None = None
    bias: str | None = None
    magnitude: str | None = None
    is_embedding: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter's files as they were when it was opened.

    Attributes:
        checkpoint: its files and tensors, like a model's; ``config`` is the content of ``adapter_config.json``, side
            files are those of the tokenizer that was saved with it.
        config: what of it decides how it is applied.
        changes: what it does, by the name of the module without `KEY_PREFIX`. Of several parameters of one module, each
            has its name with one ``.base_layer`` more.
        replaced: tensors that take the place of the base's: name without `KEY_PREFIX` to stored name.
        rows: rows that take the place of some of a module's weight, by its name; they are those that the config lists.
    """

    checkpoint: Checkpoint
    config: AdapterConfig
    changes: Mapping[str, Change]
    replaced: Mapping[str, str]
    rows: Mapping[str, str]

    @property
    def where(self) -> str:
        """The adapter, for messages."""
        return f"adapter {self.checkpoint.reference}"

    def spec(self, stored: str) -> TensorSpec:
        """Spec of a stored tensor."""
        return self.checkpoint.tensors[stored][0]


@dataclass(slots=True)
class _Found:
    changes: dict[str, Change] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)


def open_adapter(source: Source, reference: str) -> Adapter:
    """Read the config and all headers of an adapter; no weights.

    Args:
        source: its store.
        reference: the adapter as the user named it, for messages.

    Raises:
        ModelError: there is nothing, no adapter, or an adapter of a kind that cannot be applied; names the kind and the
            remedy.
        CheckpointError: the weights are not safetensors, or malformed, incomplete or contradictory.
        StorageError: the store failed.
    """
    listing = {file.name: file for file in source.list()}
    if isinstance(source, LinkedSource):
        wanted = (ADAPTER_CONFIG_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME, PICKLED_NAME)
        source.check_links(lambda name: name in wanted or is_tokenizer_file(name))
    where = source.uri if source.uri == reference else f"{reference} ({source.uri})"
    if ADAPTER_CONFIG_NAME not in listing:
        what = f"there is no {ADAPTER_CONFIG_NAME}{nearest(ADAPTER_CONFIG_NAME, listing)}"
        if "config.json" in listing:
            what = f"this is a model, not a LoRA adapter: there is no {ADAPTER_CONFIG_NAME}"
        raise ModelError(
            what if listing else "there are no files",
            where=where,
            remedy="what follows the '+' of base+adapter must be a folder that PEFT saved; check the path or prefix",
        )
    data = source.read(ADAPTER_CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES)
    config = parse_adapter_config(data, f"{source.uri}/{ADAPTER_CONFIG_NAME}")
    files, tensors = _open_weights(source, listing, where)
    found = _sort(tensors, where, has_nested=bool(config.parameters))
    warnings = [f"{reference}: {warning}" for warning in config.warnings]
    tokenizer = [file for file in listing.values() if is_tokenizer_file(file.name)]
    if not any(is_vocabulary_file(file.name) for file in tokenizer):
        tokenizer = []  # settings alone are of no use without the vocabulary that they were saved with
    checkpoint = Checkpoint(source, reference, files, tensors, config.content, side_files=tokenizer, warnings=warnings)
    return Adapter(checkpoint, config, found.changes, found.replaced, found.rows)


def _open_weights(
    source: Source, listing: Mapping[str, FileStat], where: str
) -> tuple[dict[str, FileStat], dict[str, tuple[TensorSpec, Location]]]:
    weight_map: Mapping[str, str] | None = None
    if WEIGHTS_NAME in listing:
        files = [WEIGHTS_NAME]
    elif WEIGHTS_INDEX_NAME in listing:
        index = source.read(WEIGHTS_INDEX_NAME, max_bytes=MAX_INDEX_BYTES)
        weight_map = parse_index(index, f"{source.uri}/{WEIGHTS_INDEX_NAME}")
        files = sorted(set(weight_map.values()))
    elif PICKLED_NAME in listing:
        files = [PICKLED_NAME]
    else:
        raise CheckpointError(f"there is no {WEIGHTS_NAME}", where=where, remedy="download or copy the adapter again")
    missing = [file for file in files if file not in listing]
    if missing:
        if isinstance(source, LinkedSource):
            source.check_links(missing.__contains__)
        raise CheckpointError(
            f"{counted(len(missing), 'weight file')} of {len(files)} missing: {missing[0]}",
            where=where,
            remedy="the adapter is incomplete: download or copy the rest",
        )
    with ThreadPoolExecutor(min(_NUM_THREADS, len(files)), thread_name_prefix="headers") as pool:
        headers = list(pool.map(lambda name: read_weight_header(source, name), files))
    tensors: dict[str, tuple[TensorSpec, Location]] = {}
    for file, (header, _) in zip(files, headers, strict=True):
        there = header.tensors
        tensors |= {n: there[n] for n in there if weight_map is None or weight_map.get(n) == file}
    absent = [name for name in weight_map or () if name not in tensors]
    if absent or not tensors:
        what = f"{absent[0]} is not in the file that the index names for it" if absent else "there are no tensors"
        raise CheckpointError(what, where=where, remedy="download or copy the adapter again")
    return {file: stat for file, (_, stat) in zip(files, headers, strict=True)}, tensors


def _sort(tensors: Mapping[str, tuple[TensorSpec, Location]], where: str, *, has_nested: bool) -> _Found:
    """Tell factors from whole tensors, by their names; ``has_nested`` if one module may have several pairs."""
    found = _Found()
    for stored in tensors:
        name = stored.removeprefix(KEY_PREFIX)
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            _enter(found, stored, factor, where, has_nested=has_nested)
        elif (rows := _ROWS.fullmatch(name)) is not None:
            if rows["module"] in found.rows:
                raise _twice(found.rows[rows["module"]], stored, where)
            found.rows[rows["module"]] = stored
        elif ".lora_" in name or (".token_adapter." in name and ".base_layer." not in name):
            raise ModelError(
                f"tensor {stored!r} is of an unknown kind",
                where=where,
                remedy="merge the adapter with PEFT (merge_and_unload) and name the result",
            )
        elif _COPY_OF_BASE not in name:
            plain = _WRAPPED.sub("", name)
            known = found.replaced.setdefault(plain, stored)
            if known != stored:
                found.replaced[plain] = _unwrapped(known, stored, tensors, where)
    if len(found.adapters) > 1:
        raise ModelError(
            f"the file holds several adapters: {', '.join(sorted(found.adapters))}",
            where=where,
            remedy="save each with PEFT's save_pretrained() and name the one to apply",
        )
    return found


def _enter(found: _Found, stored: str, factor: re.Match[str], where: str, *, has_nested: bool) -> None:
    """Put one factor where it belongs. Older files keep the adapter's name: ``lora_A.default.weight``."""
    rest = factor["rest"].split(".")[1:]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if len(rest) > 1:
        raise ModelError(
            f"tensor {stored!r} does not belong to a LoRA", where=where, remedy="save the adapter with PEFT again"
        )
    found.adapters.update(rest)
    module = factor["module"] if has_nested else factor["module"].removesuffix(".base_layer")
    change = found.changes.setdefault(module, Change())
    part = factor["part"]
    attribute = "bias" if leaf == "bias" else "magnitude" if part == "magnitude_vector" else part[-1].lower()
    if leaf == "bias" and part != "B":
        raise ModelError(
            f"tensor {stored!r} does not belong to a LoRA", where=where, remedy="save the adapter with PEFT again"
        )
    known = getattr(change, attribute)
    if known is not None:
        raise _twice(known, stored, where)
    setattr(change, attribute, stored)
    change.is_embedding = change.is_embedding or part.startswith("embedding")


def _unwrapped(first: str, second: str, tensors: Mapping[str, tuple[TensorSpec, Location]], where: str) -> str:
    """Of a whole module stored twice, as PEFT does where the vocabulary was resized, the tensor that PEFT loads."""
    plain = [name for name in (first, second) if _SAVED not in name]
    a, b = tensors[first][0], tensors[second][0]
    if len(plain) != 1 or (a.dtype, a.shape) != (b.dtype, b.shape):
        raise _twice(first, second, where)
    return plain[0]


def _twice(first: str, second: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{first!r} and {second!r} are the same tensor under two names",
        where=where,
        remedy="save the adapter with PEFT again",
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A base's files with an adapter that is to be applied to them.

    Its side files are the base's, without the tokenizer if one was saved with the adapter.

    Attributes:
        adapter: its files.
    """

    adapter: Adapter


def adapted(base: Checkpoint, adapter: Adapter) -> AdaptedCheckpoint:
    """The base as it is, with the adapter and its tokenizer beside it."""
    attributes = {each.name: getattr(base, each.name) for each in fields(base)}
    if adapter.checkpoint.side_files:
        attributes["side_files"] = [file for file in base.side_files if not is_tokenizer_file(file.name)]
    attributes["warnings"] = [*base.warnings, *adapter.checkpoint.warnings]
    return AdaptedCheckpoint(**attributes, adapter=adapter)
