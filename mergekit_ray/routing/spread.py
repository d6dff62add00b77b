"""Where the hidden states of prompts are computed: in this process, or on workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.evaluation.device.names import CPU
from mergekit_ray.routing.batches import Batch


class Spread(Protocol):
    """Somebody who computes states.

    Attributes:
        num_parts: into how many parts prompts may be split. Each part reads the whole model once.
    """

    @property
    def num_parts(self) -> int: ...  # noqa: D102 - see the class

    def states(
        self, checkpoint: Checkpoint, parts: Sequence[Sequence[Batch]], *, average: bool
    ) -> Sequence[np.ndarray]:
        """`routing.layers.prompt_states` of each part, in order; see there for the arguments and errors."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """In this process, on a device by its resolved name (`evaluation.device.names.resolve`)."""

    device: str = CPU
    num_parts: int = 1

    def states(
        self, checkpoint: Checkpoint, parts: Sequence[Sequence[Batch]], *, average: bool
    ) -> Sequence[np.ndarray]:
        """See `Spread.states`."""
        from mergekit_ray.routing.layers import prompt_states  # noqa: PLC0415 - imports torch

        return [prompt_states(checkpoint, part, average=average, device=self.device) for part in parts]
