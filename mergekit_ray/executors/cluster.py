"""Whether there is a Ray cluster to run on, and what has room there, without importing ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.evaluation.device.names import AUTO, CPU, CUDA


def in_ray_cluster() -> bool:
    """Whether this process runs inside a job submitted to a Ray cluster, or is pointed to one by ``RAY_ADDRESS``."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def wants_ray(executor: str | None, address: str | None) -> bool:
    """Whether a merge is to run on Ray: because it is asked for by its name, by an address, or by where we are."""
    return executor == "ray" if executor is not None else address is not None or in_ray_cluster()


def worker_slots(nodes: Sequence[Mapping[str, float]], cpus_per_worker: int) -> tuple[int, int]:
    """How many workers the nodes have room for, and how many of them beside a GPU each.

    Args:
        nodes: what Ray says of each node's resources, by ``CPU`` and ``GPU``.
        cpus_per_worker: CPUs that each worker takes, on a GPU or not.
    """
    slots = [int(node.get("CPU", 0)) // cpus_per_worker for node in nodes]
    gpus = [min(room, int(node.get("GPU", 0))) for room, node in zip(slots, nodes, strict=True)]
    return sum(slots), sum(gpus)


def check_ray_device(name: str) -> None:
    """Refuse a device that only one process knows by that name.

    Raises:
        ConfigError: a GPU is named by its number.
    """
    if name not in (AUTO, CPU, CUDA):
        raise ConfigError(
            f"device {name!r}: Ray gives each worker a GPU of its own",
            remedy="pass `device='cuda'`, and `num_workers=` for how many",
        )
