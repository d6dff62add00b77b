"""What a log sees of a merge: timed lines, JSON lines, or nothing. A terminal's live bar is in `cli.live`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Final, Protocol

from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.reporting.progress import Progress

_LINE_SECONDS: Final = 10.0


class Reporter(Protocol):
    """Told what happens, to show it to a person or a log."""

    def begin(self, plan: Plan) -> None:
        """A plan is about to be carried out. Called before `progress`, and again for each further plan."""
        ...

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Something worth a line: ``planned``, ``resumed``, ``shard_done``, ``shard_retried``, ``worker_lost``, ...

        Args:
            kind: of event.
            message: for a person.
            fields: for a program; none of them is called ``event``, ``message`` or ``seconds``.
        """
        ...

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """Called a few times a second while shards run."""
        ...


class SilentReporter:
    """Says nothing."""

    def begin(self, plan: Plan) -> None:
        """Ignored."""

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Ignored."""

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """Ignored."""


class Meter:
    """Rates and remaining time from the workers' counters, over a sliding window.

    Args:
        total_bytes: to be read and written.
        clock: seconds, as `time.monotonic`.

    Attributes:
        samples: of the window: the time, and the bytes read and written until then.
    """

    def __init__(self, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_bytes = total_bytes
        self._clock = clock
        self.samples: list[tuple[float, int]] = []

    def update(self, progress: Progress) -> tuple[float, float | None]:
        """Bytes per second read and written together, and seconds to go (None while unknown)."""
        now, done = self._clock(), progress.read_bytes + progress.written_bytes
        self.samples.append((now, done))
        while len(self.samples) > 2 and now - self.samples[0][0] > _LINE_SECONDS:
            self.samples.pop(0)
        then, before = self.samples[0]
        # Counters go back when a worker is lost with what it had done.
        rate = max(0.0, (done - before) / (now - then)) if now > then else 0.0
        return rate, (max(0, self._total_bytes - done) / rate if rate > 0 else None)


class LineReporter:
    """A line per event, and one every ten seconds: for logs and pipes."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = self._clock()
        self._last = self._began
        self._meter = Meter(0)
        self._total = 0

    def begin(self, plan: Plan) -> None:
        """Remember how much there is to do."""
        self._meter = Meter(plan.read_bytes + plan.num_bytes, self._clock)
        self._total = plan.num_bytes

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """One line."""
        del kind, fields
        self._line(message)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """A line every ten seconds."""
        rate, remaining = self._meter.update(progress)
        if self._clock() - self._last < _LINE_SECONDS:
            return
        self._last = self._clock()
        left = "" if remaining is None else f", {duration(remaining)} to go"
        self._line(
            f"{format_bytes(progress.written_bytes)} of {format_bytes(self._total)} written, "
            f"{num_done} of {num_shards} shards, {format_bytes(rate)}/s{left}"
        )

    def _line(self, message: str) -> None:
        print(f"[{self._clock() - self._began:7.1f}s] {message}", file=self._stream, flush=True)


class JsonReporter:
    """A JSON object per line on standard output."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._began = self._clock()
        self._last = 0.0
        self._meter = Meter(0)

    def begin(self, plan: Plan) -> None:
        """Remember how much there is to do."""
        self._meter = Meter(plan.read_bytes + plan.num_bytes, self._clock)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """``{"seconds": ..., "event": kind, "message": ..., ...}``, with the seconds since this reporter was made."""
        assert fields.keys().isdisjoint(("event", "message", "seconds")), fields
        self._emit({"event": kind, "message": message, **fields})

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """A ``progress`` event once a second."""
        rate, remaining = self._meter.update(progress)
        if self._clock() - self._last < 1.0:
            return
        self._last = self._clock()
        self._emit(
            {
                "event": "progress",
                "read_bytes": progress.read_bytes,
                "fetched_bytes": progress.fetched_bytes,
                "written_bytes": progress.written_bytes,
                "num_tensors": progress.num_tensors,
                "shards_done": num_done,
                "num_shards": num_shards,
                "bytes_per_second": round(rate),
                "remaining_seconds": None if remaining is None else round(remaining, 1),
            }
        )

    def _emit(self, data: dict[str, Any]) -> None:
        line = {"seconds": round(self._clock() - self._began, 3), **data}
        print(json.dumps(line), file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
