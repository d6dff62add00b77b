"""A checkpoint of codes as the weights they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ray.architectures.quantisation import Quantisation, ScaledFp8, quantisation
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import BlockScaled, Expression, Load, Mxfp4
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.weights import StoredWeights, Weights

DEQUANTISED_DTYPE = DType.BF16
"""What weights are stored in that were codes, unless the recipe says otherwise."""


def weights_of(key: str, checkpoint: Checkpoint, where: str) -> Weights:
    """The weights of a checkpoint, however they are stored.

    Args:
        key: names the checkpoint in the plan.
        checkpoint: its headers.
        where: the checkpoint, for messages.

    Raises:
        ModelError: they are quantised in a way that is not known.
    """
    found = quantisation_of(checkpoint, where)
    return StoredWeights(key, checkpoint) if found is None else QuantisedWeights(key, checkpoint, found)


def leftover_warnings(found: Quantisation, where: str) -> list[str]:
    """Warnings for a checkpoint whose config names a quantisation although its weights are numbers."""
    return [
        f"{where}: config.json says that its weights are quantised ({method}), but they are not: they are read as "
        "plain numbers, and the result's config.json does not mention quantisation"
        for method in found.leftover
    ]


def quantisation_of(checkpoint: Checkpoint, where: str) -> Quantisation | None:
    """Which tensors are codes, and which are meaningless once the codes are weights; None if none are codes.

    Raises:
        ModelError: see `weights_of`.
    """
    specs = {name: spec for name, (spec, _) in checkpoint.tensors.items()}
    return quantisation(specs, checkpoint.config, where)


class QuantisedWeights:
    """Codes and scales as the weights they stand for; everything else as it is stored.

    Args:
        key: names the checkpoint in the plan.
        checkpoint: its headers.
        found: which of its tensors are codes.
    """

    def __init__(self, key: str, checkpoint: Checkpoint, found: Quantisation) -> None:
        self._stored = StoredWeights(key, checkpoint)
        self._weights = found.weights
        self.inputs: Mapping[str, Checkpoint] = self._stored.inputs
        parts = {part for weight in found.weights.values() for part in (weight.codes, weight.scales)}
        specs = {n: spec for n, spec in self._stored.specs.items() if n not in parts and n not in found.dropped}
        self.specs: Mapping[str, TensorSpec] = specs
        for name in found.weights:
            specs[name] = TensorSpec(name, DEQUANTISED_DTYPE, self._expression(name, None).spec.shape)

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`: in float32 what is stored as codes, else a `Load`."""
        if name in self._weights:
            return self._expression(name, None if shape is None else shape[:1])
        return self._stored.expression(name, shape)

    def _expression(self, name: str, rows: tuple[int, ...] | None) -> BlockScaled | Mxfp4:
        weight = self._weights[name]
        if isinstance(weight, ScaledFp8):
            # Blocks of fewer rows are fewer rows of blocks; a scalar has no rows.
            of_blocks = None if rows is None else tuple(-(-n // weight.block[0]) for n in rows)
            return BlockScaled(self._load(weight.codes, rows), self._load(weight.scales, of_blocks), weight.block)
        return Mxfp4(self._load(weight.codes, rows), self._load(weight.scales, rows), name)

    def _load(self, name: str, rows: tuple[int, ...] | None) -> Load:
        """A tensor as it is stored, or its leading rows if it has any."""
        shape = self._stored.specs[name].shape
        load = self._stored.expression(name, shape if rows is None or not shape else (*rows, *shape[1:]))
        assert isinstance(load, Load)
        return load
