"""A part of a plan that is carried out before the rest of it, which then reads the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_ray.core.expressions import Expression, Load, Runs, rows, substituted, to_json
from mergekit_ray.core.plan import InputFile, InputModel, Plan, Shard
from mergekit_ray.core.tensors import Location
from mergekit_ray.planning.partition import partition


@dataclass(frozen=True)
class Beforehand:
    """Expressions of a plan that are computed before the rest of it, whole or some of their rows at a time.

    Attributes:
        key: of the result among the inputs of a plan that reads it; also the folder that it is written to.
        what: the result in words.
        plan: its shards are of one tensor each.
        files: the shards of the other plan that need it.
        kind: of the expressions.
        parts: by the `identity` of an expression, the shards with its rows, in their order.
    """

    key: str
    what: str
    plan: Plan
    files: frozenset[str]
    kind: type[Expression]
    parts: Mapping[str, Sequence[Shard]]

    def read_by(self, plan: Plan, uri: str, versions: Mapping[str, str]) -> Plan:
        """The plan that this is a part of, reading what it computed.

        Args:
            plan: that one.
            uri: where the result is.
            versions: of its files, by name; of none where the plan is only to be looked at.
        """

        def substitute(x: Expression) -> Expression | None:
            if not isinstance(x, self.kind) or (shards := self.parts.get(identity(x))) is None:
                return None
            read = [Load(self.key, s.tensors[0].spec, Location(s.file, len(s.header), s.num_bytes)) for s in shards]
            return rows(read, x.spec, Runs.of((i, 0, load.spec.shape[0]) for i, load in enumerate(read)))

        def reading(shard: Shard) -> Shard:
            if shard.file not in self.files:
                return shard
            tensors = [replace(t, expression=substituted(t.expression, substitute)) for t in shard.tensors]
            return replace(shard, tensors=tuple(tensors))

        files = {s.file: InputFile(s.file, s.num_bytes, versions.get(s.file, "")) for s in self.plan.shards}
        inputs = {**plan.inputs, self.key: InputModel(self.key, self.what, uri, files)}
        return replace(plan, inputs=inputs, shards=tuple(map(reading, plan.shards)))


def beforehand(
    plan: Plan,
    key: str,
    what: str,
    kind: type[Expression],
    cut: Mapping[str, Mapping[str, Expression]],
    files: frozenset[str],
) -> Beforehand:
    """Make a part of a plan.

    Args:
        plan: that it is a part of.
        key: see `Beforehand`.
        what: see there.
        kind: see there.
        cut: by the `identity` of an expression, what has its rows, by the names that these are to be written under.
        files: see `Beforehand`.
    """
    assert key not in plan.inputs
    computed = {name: x for parts in cut.values() for name, x in parts.items()}
    shards = partition([[replace(x.spec, name=name)] for name, x in computed.items()], computed, 1, stem=key)
    own = Plan(plan.inputs, shards, config={}, side_files=(), recipe={key: plan.digest}, seed=plan.seed)
    by_name = {shard.tensors[0].spec.name: shard for shard in shards}
    parts = {identified: [by_name[name] for name in named] for identified, named in cut.items()}
    return Beforehand(key, what, own, files, kind, parts)


def identity(x: Expression) -> str:
    """The same for two expressions that are equal: a digest."""
    return hashlib.sha256(json.dumps(to_json(x)).encode()).hexdigest()
