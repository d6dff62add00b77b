"""A live bar on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import Meter, duration


class LiveReporter:
    """A live bar on a terminal: bytes written, rate of reading and writing, tensors, time to go."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._meter = Meter(0)
        self._total = 0
        self._task: TaskID | None = None
        self._bar = Bar(
            TextColumn("merging"),
            BarColumn(),
            TextColumn("{task.fields[written]}"),
            TextColumn("{task.fields[rate]}"),
            MofNCompleteColumn(),
            TextColumn("tensors"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            transient=True,
        )

    def begin(self, plan: Plan) -> None:
        """A new bar, which appears with the first progress."""
        self._meter = Meter(plan.read_bytes + plan.num_bytes)
        self._total = plan.num_bytes
        if self._task is not None:
            self._bar.remove_task(self._task)
        num_tensors = sum(len(shard.tensors) for shard in plan.shards)
        self._task = self._bar.add_task("merge", total=num_tensors, written="", rate="", eta="")

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """A line above the bar; finished shards move the bar only."""
        del fields
        if kind in ("published", "publishing", "checking", "already_done"):
            self._bar.stop()
        if kind not in ("shard_done", "checking", "publishing"):
            self._console.print(Text(message))

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """Move the bar."""
        del num_done, num_shards
        rate, remaining = self._meter.update(progress)
        fields: dict[str, Any] = {
            "written": f"{format_bytes(progress.written_bytes)} of {format_bytes(self._total)}",
            "rate": f"{format_bytes(rate)}/s",
            "eta": "" if remaining is None else f"{duration(remaining)} to go",
        }
        assert self._task is not None  # `begin` comes first
        self._bar.start()
        self._bar.update(self._task, completed=progress.num_tensors, **fields)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
