"""A live bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from mergekit_ray.core.plan import Plan
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import Meter, duration, level_of, line_of, traffic
from mergekit_ray.reporting.text import hanging

_STYLES: Final = {"warning": "bold yellow", "error": "bold red"}


class _TwoLines(Bar):
    """The bar, and below it a line of text."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below, overflow="ellipsis", no_wrap=True)


class LiveReporter:
    """A live bar on a terminal: tensors and time to go, and below it what was read and written, and how fast."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._meter = Meter(0)
        self._plan: Plan | None = None
        self._task: TaskID | None = None
        self._bar = _TwoLines(
            TextColumn("merging"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("tensors"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            transient=True,
            expand=True,
        )

    def begin(self, plan: Plan) -> None:
        """A new bar, which appears with the first progress."""
        self._meter = Meter(plan.read_bytes + plan.num_bytes)
        self._plan = plan
        if self._task is not None:
            self._bar.remove_task(self._task)
        num_tensors = sum(len(shard.tensors) for shard in plan.shards)
        self._task = self._bar.add_task("merge", total=num_tensors, eta="")

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """A line above the bar; finished shards move the bar only."""
        del fields
        if kind in ("published", "publishing", "checking", "already_done"):
            self._bar.stop()
        if kind not in ("shard_done", "checking", "publishing"):
            line = Text(hanging(line_of(kind, message), self._console.width))
            if style := _STYLES.get(level_of(kind)):
                line.stylize(style, 0, line.plain.index(":") + 1)
            self._console.print(line, soft_wrap=True)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """Move the bar."""
        del num_done, num_shards
        assert self._task is not None  # `begin` comes first
        assert self._plan is not None
        rates = self._meter.update(progress)
        eta = "" if rates.remaining is None else f"{duration(rates.remaining)} to go"
        self._bar.below = traffic(progress, self._plan, rates)
        self._bar.start()
        self._bar.update(self._task, completed=progress.num_tensors, eta=eta)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
