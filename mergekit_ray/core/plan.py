"""A plan: everything a merge will write, decided from headers alone.

Pure data with a JSON round trip and a digest. Two plans with one digest ask for the same model, and write the same
bytes but for routers made from prompts, whose last bits depend on the processor that computed them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import (
    Expression,
    from_json,
    read_bytes,
    spec_from_json,
    spec_to_json,
    to_json,
    without_values,
)
from mergekit_ray.core.secrets import redact, redact_data
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.core.tensors import TensorSpec

FORMAT = 1

STEM = "model"
"""What the weight files of a model are called before number and ending, as transformers reads them."""

DIFFUSERS_STEM = "diffusion_pytorch_model"
"""The same as diffusers reads them."""


INDEX_SUFFIX = ".safetensors.index.json"


def index_name(shard_file: str) -> str:
    """What the index of the weights is called that one of whose files is called so."""
    stem = re.sub(r"(-\d{5,}-of-\d{5,})?\.safetensors$", "", shard_file)
    return f"{stem}{INDEX_SUFFIX}"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of an input as it was when the plan was made.

    Attributes:
        name: path inside the checkpoint, with ``/``.
        num_bytes: its size.
        version: ETag, commit or size-and-mtime; reads are refused when the file no longer has it.
    """

    name: str
    num_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class InputModel:
    """A model as the plan reads it.

    Attributes:
        key: short name used by `Load`.
        reference: the model as the recipe names it, without credentials.
        uri: where its files are.
        files: the weight files that are read, by name.
    """

    key: str
    reference: str
    uri: str
    files: Mapping[str, InputFile]

    def __post_init__(self) -> None:
        """Hide credentials."""
        object.__setattr__(self, "reference", redact(self.reference))

    def __repr__(self) -> str:
        return f"<InputModel {self.reference}: {counted(len(self.files), 'file')} of {redact(self.uri)}>"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of a shard.

    Attributes:
        expression: computes it; ``spec`` is what is stored.
        start, end: byte range inside the shard's data section (after the header), end exclusive.
    """

    spec: TensorSpec
    expression: Expression
    start: int
    end: int

    def __repr__(self) -> str:
        return f"<OutputTensor {self.spec.name}: {self.spec.dtype.config_name} {list(self.spec.shape)}>"


@dataclass(frozen=True)
class Shard:
    """One output safetensors file: the unit of work, of retry and of resume.

    Attributes:
        file: its name, e.g. ``model-00001-of-00004.safetensors``.
        header: the complete safetensors header, length prefix included.
        tensors: in file order, back to back.
    """

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Size of the file, header included."""
        return len(self.header) + (self.tensors[-1].end if self.tensors else 0)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of input the shard needs."""
        return sum(read_bytes(tensor.expression) for tensor in self.tensors)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all its tensors."""
        return sum(tensor.spec.num_elements for tensor in self.tensors)

    def __repr__(self) -> str:
        return f"<Shard {self.file}: {counted(len(self.tensors), 'tensor')}, {format_bytes(self.num_bytes)}>"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "file": self.file,
            "header": self.header.decode("latin-1"),
            "tensors": [[spec_to_json(t.spec), to_json(t.expression), t.start, t.end] for t in self.tensors],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shard:
        """Inverse of `to_json`."""
        tensors = tuple(
            OutputTensor(spec_from_json(spec), from_json(expression), start, end)
            for spec, expression, start, end in data["tensors"]
        )
        return cls(data["file"], data["header"].encode("latin-1"), tensors)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the donor that is copied beside the weights (tokenizer, generation config, modelling code, ...)."""

    model: str
    file: InputFile


@dataclass(frozen=True)
class Plan:
    """All shards with their expressions, and what is published beside them.

    Attributes:
        inputs: models by key.
        shards: in file order.
        config: the output's ``config.json``; empty if there is none.
        side_files: copied from the donor.
        generated_files: text written beside the weights, by file name.
        recipe: the recipe as given, normalised, without credentials, for the card and the manifest.
        seed: of all randomness.
        dropped: input tensors that are not used, with the reason: ``{"<model>: <tensor>": reason}``.
        aliased: tensors that share another's data: ``{name: the name that carries it}``.
        warnings: what the user should know, in words.
        recipe_text: the recipe as its author wrote it, without credentials, for the card; None if no file said it.
            It is no part of what was asked for: neither JSON nor digest has it.
        recipe_changes: what the recipe says other than that text, in words.
        stage: the stage of that text that the plan makes; None for the last.
    """

    inputs: Mapping[str, InputModel]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    side_files: tuple[SideFile, ...]
    recipe: Mapping[str, Any]
    seed: int
    generated_files: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    aliased: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    recipe_text: str | None = field(default=None, compare=False)
    recipe_changes: tuple[str, ...] = field(default=(), compare=False)
    stage: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Hide credentials: what a plan says goes into logs, the card and the manifest."""
        for name in ("recipe", "dropped", "warnings", "recipe_text", "recipe_changes"):
            object.__setattr__(self, name, redact_data(getattr(self, name)))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of weight files written."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of weights read."""
        return sum(shard.read_bytes for shard in self.shards)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all output tensors."""
        return sum(shard.num_parameters for shard in self.shards)

    @property
    def title(self) -> str:
        """What is merged, in a few words: ``linear of 2 models``."""
        method = self.recipe.get("merge_method") or next(iter(self.recipe), "merge")
        return f"{method} of {counted(len(self.inputs), 'model')}"

    def __repr__(self) -> str:
        shards = counted(len(self.shards), "shard")
        size = f"{format_bytes(self.read_bytes)} to read, {format_bytes(self.num_bytes)} to write"
        return f"<Plan {self.title}: {counted(self.num_parameters, 'parameter')} in {shards}, {size}>"

    def _repr_html_(self) -> str:
        rows = {
            "models": "\n".join(model.reference for model in self.inputs.values()),
            "parameters": f"{self.num_parameters:,}",
            "tensors": f"{sum(len(shard.tensors) for shard in self.shards):,}",
            "shards": f"{len(self.shards):,}",
            "to read": format_bytes(self.read_bytes),
            "to write": format_bytes(self.num_bytes),
            **({"warnings": "\n".join(self.warnings)} if self.warnings else {}),
        }
        return table(f"Plan: {self.title}", rows)

    @property
    def index_file(self) -> str:
        """Name of the index: the last file to be written, which makes the model visible."""
        return index_name(self.shards[0].file if self.shards else f"{STEM}.safetensors")

    @cached_property
    def index(self) -> dict[str, Any]:
        """Content of the index, as transformers writes it."""
        total = sum(tensor.spec.num_bytes for shard in self.shards for tensor in shard.tensors)
        weight_map = {tensor.spec.name: shard.file for shard in self.shards for tensor in shard.tensors}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; infinities of the config, which JSON has not, as transformers 5 writes them."""
        return {
            "format": FORMAT,
            "inputs": {
                key: {
                    "reference": model.reference,
                    "uri": model.uri,
                    "files": [[f.name, f.num_bytes, f.version] for f in model.files.values()],
                }
                for key, model in self.inputs.items()
            },
            "shards": [shard.to_json() for shard in self.shards],
            "config": _tagged(self.config),
            "side_files": [[s.model, s.file.name, s.file.num_bytes, s.file.version] for s in self.side_files],
            "generated_files": self.generated_files,
            "recipe": self.recipe,
            "seed": self.seed,
            "dropped": self.dropped,
            "aliased": self.aliased,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            PlanError: written by another version of the format.
        """
        if data.get("format") != FORMAT:
            raise PlanError(
                f"plan format {data.get('format')!r} is not {FORMAT}",
                remedy="make the plan again with this version of mergekit-ray",
            )
        inputs = {
            key: InputModel(
                key, m["reference"], m["uri"], {name: InputFile(name, size, ver) for name, size, ver in m["files"]}
            )
            for key, m in data["inputs"].items()
        }
        return cls(
            inputs=inputs,
            shards=tuple(Shard.from_json(shard) for shard in data["shards"]),
            config=data["config"],
            side_files=tuple(SideFile(key, InputFile(name, size, ver)) for key, name, size, ver in data["side_files"]),
            generated_files=data["generated_files"],
            recipe=data["recipe"],
            seed=data["seed"],
            dropped=data["dropped"],
            aliased=data["aliased"],
            warnings=tuple(data["warnings"]),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that was asked for: everything but the warnings and what `without_values` leaves out.

        A literal is a router made from prompts, which are in the recipe, by a model, which is among the inputs, and so
        is the length of rows that are drawn for an existing router. A merge finds its own work before it has made
        them, and on another kind of processor.
        """
        data = self.to_json()
        del data["warnings"]
        for shard, of_shard in zip(self.shards, data["shards"], strict=True):
            for tensor, of_tensor in zip(shard.tensors, of_shard["tensors"], strict=True):
                of_tensor[1] = to_json(without_values(tensor.expression))
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _tagged(value: Any) -> Any:
    """Data of a config with ``{"__float__": "Infinity"}`` for an infinity, and so for what is no number."""
    if isinstance(value, Mapping):
        return {key: _tagged(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_tagged(each) for each in value]
    return {"__float__": json.dumps(value)} if isinstance(value, float) and not math.isfinite(value) else value
