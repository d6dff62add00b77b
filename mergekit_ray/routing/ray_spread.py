"""Hidden states of prompts, computed by tasks on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import ray
from ray.exceptions import RayError

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import InternalError, MergekitRayError, StorageError
from mergekit_ray.evaluation.device.names import AUTO, CPU, CUDA, resolve
from mergekit_ray.executors.cluster import check_ray_device, worker_slots
from mergekit_ray.executors.ray_cluster import MAX_CPUS_PER_WORKER, Cluster
from mergekit_ray.executors.ray_head import CHECK_SECONDS, Head
from mergekit_ray.routing.batches import Batch
from mergekit_ray.routing.layers import prompt_states
from mergekit_ray.storage.opening import open_source

_MAX_RETRIES: Final = 3
"""How often a part is computed again after its worker was lost."""


@dataclass(frozen=True, slots=True)
class OnRay:
    """A `routing.spread.Spread` over the workers of the cluster that this process is connected to.

    Attributes:
        device: ``auto`` (GPUs if the cluster has any), ``cpu`` or ``cuda``: one for each part.
        num_parts: as many as there is room for beside each other.
        cpus_per_part: CPUs that each takes.
    """

    device: str
    num_parts: int
    cpus_per_part: int

    @classmethod
    def over(cls, nodes: Sequence[Mapping[str, float]], device: str, num_workers: int | None) -> OnRay:
        """Over nodes of the cluster.

        Args:
            nodes: what each has, see `executors.ray_cluster.Cluster.nodes`.
            device: see `OnRay`.
            num_workers: most parts; None for what there is room for.

        Raises:
            ConfigError: a GPU is asked for by its number.
        """
        check_ray_device(device)
        cpus = max(1, min([MAX_CPUS_PER_WORKER, *(int(node.get("CPU", 0)) for node in nodes)]))
        room, gpus = worker_slots(nodes, cpus)
        on_gpus = device == CUDA or (device == AUTO and gpus > 0)
        num_parts = max(1, gpus if on_gpus else room)
        return cls(CUDA if on_gpus else CPU, min(num_parts, num_workers or num_parts), cpus)

    def states(
        self, checkpoint: Checkpoint, parts: Sequence[Sequence[Batch]], *, average: bool
    ) -> Sequence[np.ndarray]:
        """See `routing.spread.Spread.states`.

        Raises:
            StorageError: a worker was lost time and again, or the cluster has gone; else as there.
        """
        # Sources hold connections, which do not travel; what is pinned does.
        pinned = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint) if field.name != "source"}
        task = ray.remote(_compute).options(
            num_cpus=self.cpus_per_part,
            num_gpus=int(self.device == CUDA),
            max_retries=_MAX_RETRIES,
            scheduling_strategy="SPREAD",
        )
        pending = [task.remote(checkpoint.source.uri, pinned, part, average, self.device) for part in parts]
        head, left = Head(Cluster()), pending
        try:
            # Ray would wait for ever for a cluster that has gone, or end this process.
            while left:
                head.answers()
                _, left = ray.wait(left, num_returns=len(left), timeout=CHECK_SECONDS)
            results = ray.get(pending)
        except RayError as error:
            raise StorageError(
                f"no worker got through the base model's layers: {str(error).strip().splitlines()[0]}",
                where="the Ray cluster",
                remedy="see `ray status` and the logs; a worker holds one layer in float32 and two as they are stored",
            ) from error
        except KeyboardInterrupt:
            for reference in pending:
                ray.cancel(reference)
            raise
        for result in results:
            if isinstance(result, MergekitRayError):
                raise result
        return list(results)


def _compute(
    uri: str, pinned: Mapping[str, Any], part: Sequence[Batch], average: bool, device: str
) -> np.ndarray | MergekitRayError:
    """One part. Errors come back as values, so that they arrive as they were raised."""
    try:
        checkpoint = Checkpoint(source=open_source(uri), **pinned)
        return prompt_states(checkpoint, part, average=average, device=resolve(device))
    except MergekitRayError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the driver must hear of it, whatever it is
        return InternalError.wrap(error)
