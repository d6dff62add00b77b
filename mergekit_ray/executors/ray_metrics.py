"""What a merge tells Ray's metrics: the driver counts for all its workers, Ray serves it for Prometheus.

Names are Prometheus names without the ``ray_`` that Ray puts before them; of a counter, Ray serves ``ray_NAME_total``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ray.util.metrics import Counter, Gauge

from mergekit_ray.executors.driver import Outcome
from mergekit_ray.reporting.progress import Progress

OUTPUT: Final = "output"
"""The one tag: path or URI of the model that is being made."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as it is declared to Ray.
        kind: whether it only grows.
        description: with its unit.
        counter: of `Progress`, the field that it follows; None for what the driver counts itself.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    counter: str | None = None

    @property
    def exported(self) -> str:
        """What Prometheus calls it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


METRICS: Final = (
    Metric("merge_read_bytes", "counter", "bytes of input tensors read, from wherever they lie", "read_bytes"),
    Metric("merge_fetched_bytes", "counter", "bytes asked of stores", "fetched_bytes"),
    Metric("merge_written_bytes", "counter", "bytes of output tensors written", "written_bytes"),
    Metric("merge_tensors", "counter", "output tensors written", "num_tensors"),
    Metric("merge_read_seconds", "counter", "seconds that workers spent reading, added up", "read_seconds"),
    Metric("merge_compute_seconds", "counter", "seconds that workers spent computing, added up", "compute_seconds"),
    Metric("merge_write_seconds", "counter", "seconds that workers spent writing, added up", "write_seconds"),
    Metric("merge_shards_done", "counter", "shards written"),
    Metric("merge_shards_failed", "counter", "attempts at a shard that ended with an error"),
    Metric("merge_workers_lost", "counter", "shards put back because their worker was lost"),
    Metric("merge_shards_left", "gauge", "shards still to be written, those in work included"),
    Metric("merge_workers", "gauge", "workers that are up"),
    Metric("merge_workers_busy", "gauge", "workers that have a shard"),
    Metric("merge_held_bytes", "gauge", "bytes of their budgets that workers hold now, added up"),
    Metric("merge_worker_budget_bytes", "gauge", "memory budget of each worker, in bytes"),
)
"""All there are."""


class RayMetrics:
    """The metrics of one merge. Must be made in a process that is connected to Ray.

    Args:
        output: path or URI of what is made.
        num_shards: still to be written.
        budget_bytes: memory budget of each worker.
    """

    def __init__(self, output: str, num_shards: int, budget_bytes: int) -> None:
        self._counters = {
            metric.name: Counter(metric.name, metric.description, tag_keys=(OUTPUT,))
            for metric in METRICS
            if metric.kind == "counter"
        }
        self._gauges = {
            metric.name: Gauge(metric.name, metric.description, tag_keys=(OUTPUT,))
            for metric in METRICS
            if metric.kind == "gauge"
        }
        for made in (*self._counters.values(), *self._gauges.values()):
            made.set_default_tags({OUTPUT: output})
        self._told = Progress()
        self._num_left = num_shards
        self._budget_bytes = budget_bytes

    def ended(self, outcome: Outcome) -> None:
        """An attempt at a shard has ended."""
        if outcome.record is not None:
            self._counters["merge_shards_done"].inc()
            self._num_left -= 1
        else:
            self._counters["merge_workers_lost" if outcome.lost else "merge_shards_failed"].inc()

    def update(self, progress: Progress, num_workers: int, num_busy: int) -> None:
        """Where all workers together are."""
        for metric in METRICS:
            if metric.counter is not None:
                more = getattr(progress, metric.counter) - getattr(self._told, metric.counter)
                if more > 0:
                    self._counters[metric.name].inc(more)
                    setattr(self._told, metric.counter, getattr(progress, metric.counter))
        # Ray forgets a gauge once it has reported it, so we set all of them again and again.
        self._gauges["merge_shards_left"].set(self._num_left)
        self._gauges["merge_worker_budget_bytes"].set(self._budget_bytes)
        self._gauges["merge_held_bytes"].set(progress.held_bytes)
        self._gauges["merge_workers"].set(num_workers)
        self._gauges["merge_workers_busy"].set(num_busy)
