"""What all methods on task vectors (δ_i = x_i − b) share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.methods.shared.protocol import Chunk

if TYPE_CHECKING:
    import torch


class WeightedParameters(Parameters):
    """Per-model parameters of a weighted sum of task vectors."""

    weight: float = Field(description="weight of the model's task vector", allow_inf_nan=False)


class TrimmedParameters(WeightedParameters):
    """Per-model parameters of a weighted sum of trimmed task vectors."""

    density: float = Field(1.0, description="part of the task vector that is kept", ge=0.0, le=1.0)


class ScaledParameters(Parameters):
    """Global parameter that all methods on task vectors have."""

    lambda_: float = Field(1.0, alias="lambda", description="factor on the merged task vector", allow_inf_nan=False)


def task_vector(chunk: Chunk, index: int) -> torch.Tensor:
    """``x_i − b``, in place of ``x_i``."""
    assert chunk.base is not None  # held by the declarations: base REQUIRED
    return chunk.inputs[index].sub_(chunk.base)


def task_vectors(chunk: Chunk) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The base's run and all task vectors, in place of the inputs."""
    assert chunk.base is not None
    return chunk.base, [task_vector(chunk, index) for index in range(len(chunk.inputs))]
