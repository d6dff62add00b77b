"""`inspect`: what a checkpoint is, from its config and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ray.architectures.anatomy import anatomy, is_buffer
from mergekit_ray.architectures.quantisation import Quantisation, ScaledFp8, quantisation
from mergekit_ray.architectures.quantisation_config import method_of, settings_of
from mergekit_ray.architectures.sizes import hidden_size
from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.config.accepted import ModelLike
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.make import models_of


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        model: as it was named.
        uri: where its files are.
        family: the config's ``model_type``; None if it states none.
        architectures: the config's, such as ``LlamaForCausalLM``.
        num_layers: of the language model; 0 if it has none.
        hidden_size: width of its layers; None if neither config nor embedding tells.
        vocab_size: rows of the input embedding; None if there is none.
        dtypes: elements stored, by dtype, the most frequent first.
        tied: the head's weight is the embedding's.
        quantisation: how weights are stored as codes, such as ``fp8``; None if they are plain numbers.
        num_parameters: elements of the weights as they are when dequantised, buffers and unused copies left out; None
            if they are quantised in a way that is not read.
        num_bytes: of the weight files.
        num_files: weight files.
        warnings: what the user should know, in words.
    """

    model: str
    uri: str
    family: str | None
    architectures: tuple[str, ...]
    num_layers: int
    hidden_size: int | None
    vocab_size: int | None
    dtypes: Mapping[str, int]
    tied: bool
    quantisation: str | None
    num_parameters: int | None
    num_bytes: int
    num_files: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        stored = self.quantisation or next(iter(self.dtypes))
        return (
            f"<Inspection {self.model}: {self._kind()}, {counted(self.num_layers, 'layer')}, {self._parameters()}, "
            f"{stored}, {format_bytes(self.num_bytes)}>"
        )

    def _repr_html_(self) -> str:
        rows = {
            "where": self.uri,
            "family": self._kind(),
            "architectures": ", ".join(self.architectures) or "not stated",
            "layers": self.num_layers,
            "hidden size": self.hidden_size or "unknown",
            "vocabulary": "none" if self.vocab_size is None else f"{self.vocab_size:,}",
            "dtypes": ", ".join(f"{name} ({number:,})" for name, number in self.dtypes.items()),
            "embedding and head tied": "yes" if self.tied else "no",
            "quantisation": self.quantisation or "none",
            "parameters": "unknown" if self.num_parameters is None else f"{self.num_parameters:,}",
            "size": f"{format_bytes(self.num_bytes)} in {counted(self.num_files, 'file')}",
            **({"warnings": "\n".join(self.warnings)} if self.warnings else {}),
        }
        return table(self.model, rows)

    def _kind(self) -> str:
        return self.family or "unknown family"

    def _parameters(self) -> str:
        return "unknown parameters" if self.num_parameters is None else counted(self.num_parameters, "parameter")


def inspect(model: ModelLike) -> Inspection:
    """Say what a checkpoint is, from its config and headers; no weight is read.

    Args:
        model: as a recipe names it: a folder, ``org/name[@revision]`` or a URI, with ``+lora`` or not.

    Raises:
        ConfigError: this names no model.
        ModelError, CheckpointError: it is not there, incomplete, or malformed.
        StorageError: the store failed.
    """
    try:
        reference = ModelReference.from_data(model)
    except ValueError as error:
        raise ConfigError(str(error), remedy="name the model as in a recipe, such as org/name or a folder") from None
    [checkpoint] = open_models([reference]).values()
    stored = {name: spec for name, (spec, _) in checkpoint.tensors.items()}
    specs: Mapping[str, TensorSpec] | None = None
    config, parts, files = checkpoint.config, None, list(checkpoint.files.values())
    warnings = list(checkpoint.warnings)
    try:
        codes = quantisation(stored, config, str(reference))
    except ModelError as error:
        codes = None
        warnings.append(f"it cannot be merged: {error.what}")
        stated = ", ".join(map(method_of, settings_of(config))) or "of an unknown kind"
    else:
        stated = _described(codes, config)
        [seen] = models_of({reference: checkpoint}).values()
        specs, config, parts = seen.weights.specs, seen.checkpoint.config, seen.anatomy
        files = [file for each in seen.weights.inputs.values() for file in each.files.values()]
    parts = parts or anatomy(stored, config, str(reference))
    seen_specs = stored if specs is None else specs
    embedding = None if parts.embedding is None else seen_specs[parts.embedding]
    return Inspection(
        model=str(reference),
        uri=checkpoint.source.uri,
        family=_text(config.get("model_type")),
        architectures=_texts(config.get("architectures")),
        num_layers=parts.num_layers,
        hidden_size=hidden_size(embedding, config),
        vocab_size=None if embedding is None else embedding.shape[0],
        dtypes=_dtypes(stored.values()),
        tied=parts.tied,
        quantisation=stated or None,
        num_parameters=None
        if specs is None
        else sum(x.num_elements for name, x in specs.items() if not is_buffer(name) and name not in parts.redundant),
        num_bytes=sum(file.num_bytes for file in files),
        num_files=len(files),
        warnings=tuple(warnings),
    )


def _described(codes: Quantisation | None, config: Mapping[str, Any]) -> str:
    """How weights are quantised; empty if they are not, whatever the config says."""
    if codes is None or not codes.weights:
        return ""
    named = dict.fromkeys(map(method_of, settings_of(config)))
    kinds = dict.fromkeys("fp8" if isinstance(weight, ScaledFp8) else "mxfp4" for weight in codes.weights.values())
    return ", ".join(named or kinds)


def _dtypes(specs: Iterable[TensorSpec]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for spec in specs:
        counts[spec.dtype.config_name] += spec.num_elements
    return dict(counts.most_common())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()
