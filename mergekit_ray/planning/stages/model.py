"""What a stage makes, seen as a model: its tensors are expressions, its files lie beside other models or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Final

from mergekit_ray.architectures.anatomy import anatomy, opaque
from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint, adapted
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import is_tokenizer_file
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import CheckpointError, PlanError
from mergekit_ray.core.expressions import Expression, Runs, rows
from mergekit_ray.core.plan import InputFile, SideFile
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.stages.build import Built
from mergekit_ray.storage.protocols import FileStat, Source, WritableBuffer

_MAX_NODES: Final = 5_000
"""Of the expression of a tensor."""


def model_of(key: str, name: str, built: Built) -> Model:
    """A stage's result as later stages see it.

    Args:
        key: names the model among those of the plan; nothing is read under it.
        name: of the stage.
        built: what it makes.

    Raises:
        ModelError: its tensors make no sense.
        PlanError: it merges earlier stages so often that a tensor's expression grows beyond measure.
    """
    _check_sizes(name, built.lowering.expressions)
    inputs = {key: c for model in built.models.values() for key, c in model.weights.inputs.items()}
    weights = StageWeights(built.lowering.expressions, inputs)
    files: dict[str, bytes | tuple[Source, FileStat]] = {
        side.file.name: (inputs[side.model].source, FileStat(side.file.name, side.file.num_bytes, side.file.version))
        for side in built.side_files
    }
    files |= {file: text.encode() for file, text in built.lowering.files.items()}
    source = StageFiles(f"stage {name}", files)
    checkpoint = Checkpoint(
        source,
        name,
        files={},
        tensors={},
        config=built.config,
        side_files=source.list(),
        metadata=built.metadata or {},
        is_raw=built.is_raw,
        single_file=f"{built.stem}.safetensors" if built.is_single else None,
    )
    parts = opaque(weights.specs) if built.is_raw else anatomy(weights.specs, built.config, f"stage {name}")
    return Model(
        key,
        ModelReference(name),
        checkpoint,
        weights,
        parts,
        side_files=tuple(built.side_files),
        files=built.lowering.files,
    )


def with_adapter(model: Model, reference: ModelReference, checkpoint: Checkpoint, key: str, *, wide: bool) -> Model:
    """A stage's result with an adapter applied.

    Args:
        model: that of `model_of`.
        reference: the stage and the adapter, as the recipe names them.
        checkpoint: the adapter on a base that is empty.
        key: names the adapter in the plan.
        wide: apply it in float64.

    Raises:
        ModelError, CheckpointError: it does not fit.
    """
    assert isinstance(checkpoint, AdaptedCheckpoint)
    weights = LoraWeights(model.weights, model.checkpoint.config, key, checkpoint.adapter, wide=wide)
    tokenizer = checkpoint.adapter.checkpoint.side_files
    return Model(
        f"{model.key}+{key}",
        reference,
        replace(adapted(model.checkpoint, checkpoint.adapter), config=weights.config),
        weights,
        anatomy(weights.specs, weights.config, f"stage {reference}"),
        side_files=(*model.side_files, *(SideFile(key, InputFile(*astuple(stat))) for stat in tokenizer)),
        files={name: text for name, text in model.files.items() if not (tokenizer and is_tokenizer_file(name))},
    )


def _check_sizes(stage: str, expressions: Mapping[str, Expression]) -> None:
    """Check that no expression is too large: one that merges a stage twice has all that is below it twice."""
    known: dict[int, int] = {}

    def size(x: Expression) -> int:
        if id(x) not in known:
            known[id(x)] = 1 + sum(map(size, x.children()))
        return known[id(x)]

    for name, expression in expressions.items():
        if size(expression) > _MAX_NODES:
            raise PlanError(
                f"{name!r} takes {size(expression):,} steps from the models, since stages merge others several times",
                where=f"stage {stage}",
                remedy="write the model of an earlier stage with a recipe of its own, and merge that",
            )


class StageWeights:
    """The tensors that a stage makes. See `mergekit_ray.planning.weights.Weights`.

    Args:
        expressions: by name.
        inputs: all that they may read.
    """

    def __init__(self, expressions: Mapping[str, Expression], inputs: Mapping[str, Checkpoint]) -> None:
        self._expressions = expressions
        self.inputs = inputs
        self.specs: Mapping[str, TensorSpec] = {name: replace(x.spec, name=name) for name, x in expressions.items()}

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`."""
        x = self._expressions[name]
        if shape is None or shape == x.spec.shape:
            return x
        return rows([x], TensorSpec(name, x.spec.dtype, shape), Runs.of([(0, 0, shape[0])]))


class StageFiles:
    """Files beside other models, and in memory, as a `mergekit_ray.storage.protocols.Source` of small files.

    Args:
        uri: what messages call it.
        files: by name, the content, or the store that has it under its name.
    """

    def __init__(self, uri: str, files: Mapping[str, bytes | tuple[Source, FileStat]]) -> None:
        self.uri = uri
        self._files = dict(sorted(files.items()))

    def list(self) -> list[FileStat]:
        """See `Source.list`. The version of what is in memory is its digest."""
        return [stat for name in self._files if (stat := self.stat(name)) is not None]

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        match self._files.get(name):
            case None:
                return None
            case bytes() as data:
                return FileStat(name, len(data), hashlib.sha256(data).hexdigest())
            case (_, stat):
                return stat

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        match self._files.get(name):
            case None:
                raise CheckpointError("there is no such file", where=f"{self.uri}/{name}")
            case bytes() as data:
                if len(data) > max_bytes:
                    raise CheckpointError(f"larger than {max_bytes} bytes", where=f"{self.uri}/{name}")
                return data
            case (source, _):
                return source.read(name, max_bytes=max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        stat = self.stat(name)
        data = self.read(name, max_bytes=stat.num_bytes if stat is not None else 0)
        assert stat is not None
        return data[:num_bytes], stat

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""
        stat = self.stat(name)
        data = self.read(name, max_bytes=stat.num_bytes if stat is not None else 0)
        if version not in (None, stat and stat.version):
            raise CheckpointError("the file has changed", where=f"{self.uri}/{name}")
        for (start, end), buffer in zip(ranges, buffers, strict=True):
            memoryview(buffer).cast("B")[:] = data[start:end]
        return sum(end - start for start, end in ranges)
