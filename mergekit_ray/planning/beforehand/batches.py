"""Approximations that take long, cut into batches of rows: workers share them, and a rerun finds them done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.expressions import Approximated, Expression, Runs, rows
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.beforehand.part import Beforehand, beforehand, identity

BATCH_WORK: Final = 2e13
"""Floating-point operations of a batch, about: a few minutes of a few cores."""

BATCH_ROWS: Final = 1024
"""A batch has a multiple of so many rows, enough for all threads of a worker."""


def batches_of(plan: Plan, batch_work: float = BATCH_WORK, batch_rows: int = BATCH_ROWS) -> Beforehand | None:
    """Cut the approximations of a plan that are more than a batch.

    Args:
        plan: to be carried out.
        batch_work: floating-point operations of a batch.
        batch_rows: a batch has a multiple of so many rows.

    Returns:
        The batches; None if there is nothing to cut.
    """
    found: dict[str, Approximated] = {}
    files = set()
    for shard in plan.shards:
        for x in (x for tensor in shard.tensors for x in _approximated(tensor.expression)):
            if x.spec.shape[0] > _num_rows(x, batch_work, batch_rows):
                found[identity(x)] = x
                files.add(shard.file)
    if not found:
        return None
    cut: dict[str, dict[str, Expression]] = {}
    for number, (key, x) in enumerate(found.items()):
        step, end = _num_rows(x, batch_work, batch_rows), x.spec.shape[0]
        named = ((f"{x.spec.name}.{number}.{first}", first) for first in range(0, end, step))
        cut[key] = {name: _batch(x, name, first, min(first + step, end)) for name, first in named}
    return beforehand(plan, "rows", "rows of new tokens", Approximated, cut, frozenset(files))


def _approximated(x: Expression) -> Iterator[Approximated]:
    if isinstance(x, Approximated):
        yield x
    for child in x.children():
        yield from _approximated(child)


def _num_rows(x: Approximated, batch_work: float, batch_rows: int) -> int:
    """Rows of a batch."""
    if x.donor_shared is None or x.donor_missing is None:
        return x.spec.shape[0]
    shared, donor_width = x.donor_shared.spec.shape
    work = APPROXIMATIONS.get(x.method).row_work(x.parameters, shared, x.spec.shape[1], donor_width)
    return x.spec.shape[0] if work <= 0 else batch_rows * max(1, round(batch_work / (work * batch_rows)))


def _batch(x: Approximated, name: str, first: int, last: int) -> Approximated:
    assert x.donor_missing is not None
    spec = TensorSpec(name, x.spec.dtype, (last - first, x.spec.shape[1]))
    missing = replace(x.donor_missing.spec, shape=(last - first, *x.donor_missing.spec.shape[1:]))
    return replace(x, spec=spec, donor_missing=rows([x.donor_missing], missing, Runs.of([(0, first, last - first)])))
