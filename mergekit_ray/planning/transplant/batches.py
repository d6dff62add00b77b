"""Approximations that take long, cut into batches of rows: workers share them, and a rerun finds them done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.expressions import Approximated, Expression, Load, Runs, rows, substituted, to_json
from mergekit_ray.core.plan import InputFile, InputModel, Plan, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.partition import partition

BATCH_WORK: Final = 2e13
"""Floating-point operations of a batch, about: a few minutes of a few cores."""

BATCH_ROWS: Final = 1024
"""A batch has a multiple of so many rows, enough for all threads of a worker."""

KEY: Final = "rows"
"""Of the batches among the inputs of a plan that reads them."""


@dataclass(frozen=True)
class Batches:
    """Approximations of a plan that are computed before the rest of it. Made by `batches_of`.

    Attributes:
        plan: its shards are the batches, of one tensor each.
        files: the shards of the other plan that need them.
        parts: by the `identity` of an approximation, the batches with its rows, in their order.
    """

    plan: Plan
    files: frozenset[str]
    parts: Mapping[str, Sequence[Shard]]

    def read_by(self, plan: Plan, uri: str, records: Mapping[str, ShardRecord]) -> Plan:
        """The plan that the batches were cut from, reading rows where it approximated them.

        Args:
            plan: that one.
            uri: where the batches are.
            records: of each batch, by file.
        """

        def substitute(x: Expression) -> Expression | None:
            if not isinstance(x, Approximated) or (shards := self.parts.get(identity(x))) is None:
                return None
            read = [Load(KEY, s.tensors[0].spec, Location(s.file, len(s.header), s.num_bytes)) for s in shards]
            return rows(read, x.spec, Runs.of((i, 0, load.spec.shape[0]) for i, load in enumerate(read)))

        def reading(shard: Shard) -> Shard:
            if shard.file not in self.files:
                return shard
            tensors = [replace(t, expression=substituted(t.expression, substitute)) for t in shard.tensors]
            return replace(shard, tensors=tuple(tensors))

        files = {s.file: InputFile(s.file, s.num_bytes, records[s.file].version) for s in self.plan.shards}
        inputs = {**plan.inputs, KEY: InputModel(KEY, "rows of new tokens", uri, files)}
        return replace(plan, inputs=inputs, shards=tuple(map(reading, plan.shards)))


def batches_of(plan: Plan, batch_work: float = BATCH_WORK, batch_rows: int = BATCH_ROWS) -> Batches | None:
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
    assert KEY not in plan.inputs
    cut: dict[str, Approximated] = {}
    names: dict[str, list[str]] = {}
    for number, (key, x) in enumerate(found.items()):
        step, end = _num_rows(x, batch_work, batch_rows), x.spec.shape[0]
        for first in range(0, end, step):
            name = f"{x.spec.name}.{number}.{first}"
            cut[name] = _batch(x, name, first, min(first + step, end))
            names.setdefault(key, []).append(name)
    shards = partition([[x.spec] for x in cut.values()], cut, max_shard_bytes=1, stem="rows")
    by_name = {shard.tensors[0].spec.name: shard for shard in shards}
    of_rows = Plan(plan.inputs, shards, config={}, side_files=(), recipe={"rows": plan.digest}, seed=plan.seed)
    parts = {key: [by_name[name] for name in listed] for key, listed in names.items()}
    return Batches(of_rows, frozenset(files), parts)


def identity(x: Approximated) -> str:
    """The same for two approximations that are equal: a digest."""
    return hashlib.sha256(json.dumps(to_json(x)).encode()).hexdigest()


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
