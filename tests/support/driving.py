"""What tests of the driver share: shards, a reporter and a referee that remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import OutputTensor, Plan, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.executors.driver import Job
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.worker.resources import WorkerOptions

JOB = Job({}, "/nowhere", ".records", WorkerOptions(memory_bytes=1 << 30))


def shard(file: str, num_elements: int = 8) -> Shard:
    """A shard of one tensor of the same name."""
    spec = TensorSpec(file, DType.F32, (num_elements,))
    load = Load("m0", spec, Location("in.safetensors", 0, spec.num_bytes))
    return Shard(file, b"header", (OutputTensor(spec, load, 0, spec.num_bytes),))


class Notes:
    """A reporter that remembers."""

    def __init__(self, on_event: Any = None) -> None:
        self.events: list[tuple[str, str | None]] = []
        self.seen: list[tuple[int, int]] = []
        self._on_event = on_event or (lambda kind: None)

    def begin(self, plan: Plan) -> None:
        """See `Reporter.begin`."""
        del plan

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """See `Reporter.event`."""
        self.events.append((kind, fields.get("file")))
        self._on_event(kind)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """See `Reporter.progress`."""
        self.seen.append((num_done, num_shards))


class Rules:
    """A referee that remembers, and gives what it settles the version ``settled``."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.given_up: list[tuple[str, list[str]]] = []

    def give_up(self, worker: str, files: Sequence[str]) -> None:
        """See `Referee.give_up`."""
        self.given_up.append((worker, list(files)))

    def settle(self, record: ShardRecord) -> ShardRecord:
        """See `Referee.settle`."""
        return replace(record, version="settled")
