"""What a plan comes to, in numbers and in a line."""

from __future__ import annotations

from typing import Any

from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.planning.beforehand.stages import least_memory
from mergekit_ray.planning.windows import comfortable_memory


def figures(plan: Plan) -> dict[str, Any]:
    """Counts, bytes and the digest, as plain data. ``min_memory_bytes`` is the least budget of a worker that works,
    ``memory_bytes`` the one at which its work overlaps.
    """  # noqa: D205 - one sentence after another
    return {
        "num_shards": len(plan.shards),
        "num_tensors": sum(len(shard.tensors) for shard in plan.shards),
        "num_parameters": plan.num_parameters,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.num_bytes,
        "min_memory_bytes": least_memory(plan),
        "memory_bytes": comfortable_memory(plan),
        "plan_digest": plan.digest,
    }


def summary(plan: Plan) -> str:
    """One line for a person."""
    return (
        f"{counted(plan.num_parameters, 'parameter')} in {counted(len(plan.shards), 'shard')}; "
        f"{format_bytes(plan.read_bytes)} to read, {format_bytes(plan.num_bytes)} to write"
    )
