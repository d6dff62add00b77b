"""A model's tensors as arithmetic sees them: names, specs, and the expression that gives each.

Mostly a tensor is the bytes of a file. A view of another kind (an adapter applied to a base, codes with their scales)
implements `Weights` over a checkpoint or over another view; whatever merges tensors does not see the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Expression, Load
from mergekit_ray.core.tensors import Location, TensorSpec


class Weights(Protocol):
    """The tensors of one model.

    Attributes:
        specs: name to name, dtype and shape. The dtype is the one arithmetic in the inputs' own dtype would use.
        inputs: what is read, by the key that `Load.model` names it by.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...  # noqa: D102 - see the class

    @property
    def inputs(self) -> Mapping[str, Checkpoint]: ...  # noqa: D102 - see the class

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """What computes a tensor; with a ``shape`` of fewer leading rows, those of it.

        Its dtype may be wider than that of ``specs``: a view that computes gives what it computed, unrounded.
        """
        ...


class StoredWeights:
    """Tensors as stored in a checkpoint's files.

    Args:
        key: names the checkpoint in the plan.
        checkpoint: its headers.
    """

    def __init__(self, key: str, checkpoint: Checkpoint) -> None:
        self._key = key
        self._checkpoint = checkpoint
        self.specs: Mapping[str, TensorSpec] = {name: spec for name, (spec, _) in checkpoint.tensors.items()}
        self.inputs: Mapping[str, Checkpoint] = {key: checkpoint}

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`: a `Load`, always."""
        spec, location = self._checkpoint.tensors[name]
        if shape is not None and spec.shape != shape:
            # Fewer rows of a row-major tensor are its leading bytes.
            spec = TensorSpec(spec.name, spec.dtype, shape)
            location = Location(location.file, location.start, location.start + spec.num_bytes)
        return Load(self._key, spec, location)


def rows_of(x: Expression, start: int, stop: int) -> Expression:
    """A run of a tensor's rows.

    Raises:
        ModelError: the tensor is computed, not stored.
    """
    if not isinstance(x, Load):
        raise ModelError(
            f"single rows of {x.spec.name!r} are to be replaced, and it is computed, not stored as it is",
            remedy="merge the adapter with PEFT (merge_and_unload) and name the result",
        )
    spec = TensorSpec(x.spec.name, x.spec.dtype, (stop - start, *x.spec.shape[1:]))
    first = x.location.start + start * (x.spec.num_bytes // max(1, x.spec.shape[0]))
    return Load(x.model, spec, Location(x.location.file, first, first + spec.num_bytes))
