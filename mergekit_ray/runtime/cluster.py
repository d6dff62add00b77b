"""Whether there is a Ray cluster to run on, without importing ray."""

from __future__ import annotations

import os


def in_ray_cluster() -> bool:
    """Whether this process runs inside a job submitted to a Ray cluster, or is told of one by ``RAY_ADDRESS``."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
