"""What a log sees of a merge: timed lines, JSON lines, or nothing. A live bar is in `reporting.live`."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any, Final, Literal, Protocol

from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.reporting.progress import Progress

_LINE_SECONDS: Final = 10.0

Level = Literal["info", "warning", "error"]

_LEVELS: Final[dict[str, Level]] = {
    "error": "error",
    **dict.fromkeys(
        ("warning", "worker_stalled", "worker_given_up", "worker_lost", "shard_retried", "lease_expired"), "warning"
    ),
}

_OWN_FIELDS: Final = frozenset({"time", "level", "run_id", "seconds", "event", "message"})


def level_of(kind: str) -> Level:
    """How much an event of this kind matters."""
    return _LEVELS.get(kind, "info")


def line_of(kind: str, message: str) -> str:
    """An event as a line of text: warnings and errors say that they are."""
    level = level_of(kind)
    return message if level == "info" else f"{level}: {message}"


class Reporter(Protocol):
    """Told what happens, to show it to a person or a log."""

    def begin(self, plan: Plan) -> None:
        """A plan is about to be carried out. Called before `progress`, and again for each further plan."""
        ...

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Something worth a line: ``planned``, ``resumed``, ``shard_done``, ``shard_retried``, ``worker_lost``, ...

        Args:
            kind: of event.
            message: for a person. That it is a warning is not part of it: see `level_of`.
            fields: for a program; none of them has the name of a field that every event has.
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


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast it goes.

    Attributes:
        read, written: bytes per second.
        remaining: seconds to go; None while unknown.
    """

    read: float
    written: float
    remaining: float | None


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
        self.samples: list[tuple[float, int, int]] = []

    def update(self, progress: Progress) -> Rates:
        """The rates now."""
        now, read, written = self._clock(), progress.read_bytes, progress.written_bytes
        self.samples.append((now, read, written))
        while len(self.samples) > 2 and now - self.samples[0][0] > _LINE_SECONDS:
            self.samples.pop(0)
        then, read_then, written_then = self.samples[0]
        if now <= then:
            return Rates(0.0, 0.0, None)
        # Counters go back when a worker is lost with what it had done.
        reading, writing = (max(0.0, bytes_ / (now - then)) for bytes_ in (read - read_then, written - written_then))
        left = max(0, self._total_bytes - read - written)
        # Before the first byte is written, as while a method is compiled, the rate of reading says nothing of the rest.
        is_known = reading + writing > 0 and (written > 0 or not left)
        return Rates(reading, writing, left / (reading + writing) if is_known else None)


def traffic(progress: Progress, plan: Plan, rates: Rates) -> str:
    """``read 1.20 GB of 4.80 GB (310 MB/s), wrote 200 MB of 2.40 GB (51.0 MB/s)``; what is done has no rate."""
    parts = (
        ("read", progress.read_bytes, plan.read_bytes, rates.read),
        ("wrote", progress.written_bytes, plan.num_bytes, rates.written),
    )
    return ", ".join(
        f"{verb} {format_bytes(done)} of {format_bytes(total)}" + (f" ({format_bytes(rate)}/s)" if done < total else "")
        for verb, done, total, rate in parts
    )


class LineReporter:
    """A line per event, and one every ten seconds: for logs and pipes."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = self._clock()
        self._last = self._began
        self._plan: Plan | None = None
        self._meter = Meter(0)

    def begin(self, plan: Plan) -> None:
        """Remember how much there is to do."""
        self._plan = plan
        self._meter = Meter(plan.read_bytes + plan.num_bytes, self._clock)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """One line."""
        del fields
        self._line(line_of(kind, message))

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """A line every ten seconds."""
        rates = self._meter.update(progress)
        if self._clock() - self._last < _LINE_SECONDS:
            return
        self._last = self._clock()
        assert self._plan is not None  # `begin` comes first
        left = "" if rates.remaining is None else f", {duration(rates.remaining)} to go"
        self._line(f"{traffic(progress, self._plan, rates)}, {num_done:,} of {counted(num_shards, 'shard')}{left}")

    def _line(self, message: str) -> None:
        print(f"[{self._clock() - self._began:7.1f}s] {message}", file=self._stream, flush=True)


class JsonReporter:
    """A JSON object per line on standard output.

    Each has the fields ``time`` (UTC, ISO 8601), ``level`` (`level_of`), ``run_id`` (the same for all lines of a
    command, and for no other), ``seconds`` (since this reporter was made) and ``event``; all but ``progress`` have a
    ``message``.

    Args:
        stream: to write to; None for standard output.
        clock: seconds, as `time.monotonic`.
        now: the time of day, in UTC.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._now = now
        self._run_id = uuid.uuid4().hex
        self._began = self._clock()
        self._last = 0.0
        self._meter = Meter(0)

    def begin(self, plan: Plan) -> None:
        """Remember how much there is to do."""
        self._meter = Meter(plan.read_bytes + plan.num_bytes, self._clock)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """An event with a message."""
        assert fields.keys().isdisjoint(_OWN_FIELDS), fields
        self._emit(kind, {"message": message, **fields})

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """A ``progress`` event once a second."""
        rates = self._meter.update(progress)
        if self._clock() - self._last < 1.0:
            return
        self._last = self._clock()
        self._emit(
            "progress",
            {
                "read_bytes": progress.read_bytes,
                "fetched_bytes": progress.fetched_bytes,
                "written_bytes": progress.written_bytes,
                "num_tensors": progress.num_tensors,
                "shards_done": num_done,
                "num_shards": num_shards,
                "read_bytes_per_second": round(rates.read),
                "written_bytes_per_second": round(rates.written),
                "remaining_seconds": None if rates.remaining is None else round(rates.remaining, 1),
            },
        )

    def _emit(self, kind: str, data: dict[str, Any]) -> None:
        line = {
            "time": self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": level_of(kind),
            "run_id": self._run_id,
            "seconds": round(self._clock() - self._began, 3),
            "event": kind,
            **data,
        }
        # In one piece: a signal's handler, or the thread that ends what hangs, may write a line of its own.
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
