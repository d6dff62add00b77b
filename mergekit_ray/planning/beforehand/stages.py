"""Merges of earlier stages that are computed first, where a worker has no room for them beside the later one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from mergekit_ray.core.expressions import Expression, Merge
from mergekit_ray.core.plan import OutputTensor, Plan
from mergekit_ray.planning.beforehand.part import Beforehand, beforehand, identity
from mergekit_ray.planning.windows import check_memory, memory_needed, too_large

ANYWHERE: Final = "s3://"
"""For a place that is not known: what is read from a store takes more memory than what is on a disk."""


def stages_apart(plan: Plan, memory_bytes: int) -> Beforehand | None:
    """Take earlier stages out of the tensors of a plan that do not fit into memory with them.

    A merge rounds its result to its stage's dtype, so that the bytes of the later one stay the same.

    Args:
        plan: to be carried out.
        memory_bytes: budget of a worker.

    Returns:
        What is computed first; None if everything fits, or nothing can be taken out.
    """
    found: dict[str, Merge] = {}
    files = set()
    for shard in plan.shards:
        for tensor in too_large(shard.tensors, plan, memory_bytes):
            for x in _merges_below(tensor):
                found.setdefault(identity(x), x)
                files.add(shard.file)
    if not found:
        return None
    cut = {}
    for number, (key, x) in enumerate(found.items()):
        name = f"{x.spec.name}.{number}"
        cut[key] = {name: replace(x, spec=replace(x.spec, name=name))}
    return beforehand(plan, "stages", "results of earlier stages", Merge, cut, frozenset(files))


def in_order(plan: Plan, memory_bytes: int, uri: str = ANYWHERE) -> list[Plan]:
    """The plans that are carried out one after another for a plan: first what is taken out of it, itself last.

    Args:
        plan: the plan.
        memory_bytes: budget of a worker.
        uri: where the results are kept, as far as it matters to memory: in a store, or on disk.
    """
    apart = stages_apart(plan, memory_bytes)
    if apart is None:
        return [plan]
    return [*in_order(apart.plan, memory_bytes, uri), apart.read_by(plan, uri, {})]


def check_fits(plan: Plan, memory_bytes: int, uri: str = ANYWHERE) -> list[Plan]:
    """Check that a worker has room for a plan.

    Returns:
        See `in_order`, also for the arguments.

    Raises:
        PlanError: see `check_memory`.
    """
    found = in_order(plan, memory_bytes, uri)
    for each in found:
        check_memory(each, memory_bytes)
    return found


def least_memory(plan: Plan, uri: str = ANYWHERE) -> int:
    """The least budget of a worker, in bytes, that can carry out a plan if earlier stages are computed first."""
    return max(memory_needed(each) for each in in_order(plan, 0, uri))


def _merges_below(tensor: OutputTensor) -> Iterator[Merge]:
    """The topmost merges that a tensor is made of, but for itself."""
    stack: list[Expression] = list(tensor.expression.children())
    while stack:
        node = stack.pop()
        if isinstance(node, Merge):
            yield node
        else:
            stack.extend(reversed(node.children()))
