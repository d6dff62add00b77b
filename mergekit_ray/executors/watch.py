"""Workers that have stopped, and workers that are only slow.

A worker that was stopped (a paused machine, SIGSTOP) or cannot be reached does not answer. A worker whose disk or store
hangs answers, but makes no progress. Both are reported and, after a while, given up: their shards go to others. A slow
worker keeps its shard; when there is nothing else to do, another worker starts the same shard, and the first to commit
wins (Dean and Ghemawat, MapReduce, OSDI 2004, section 3.6).
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from mergekit_ray.core.environment import seconds_of
from mergekit_ray.core.plan import Shard
from mergekit_ray.reporting.reporters import Reporter

SECONDS_VARIABLE: Final = "MERGEKIT_RAY_WORKER_SECONDS"
_SILENT_SECONDS: Final = 120.0
_STILL_TIMES: Final = 5.0
"""A worker that answers may take so many times as long: with a tensor that is computed as a whole nothing moves."""

_WARN_AFTER: Final = 0.25
_LEAST_BACKUP_SECONDS: Final = 20.0
_SLOW_TIMES: Final = 2.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How a worker that has shards in work is doing.

    Attributes:
        worker: as it is known to the output's fence; empty for one that cannot be given up.
        name: for people.
        files: its shards.
        silent_seconds: how long it has not answered; 0 if it does.
        still_seconds: how long its progress has not grown.
    """

    worker: str
    name: str
    files: tuple[str, ...]
    silent_seconds: float
    still_seconds: float


class Watch:
    """Tells which workers to give up.

    Args:
        tell: told of a worker first, while there is still time.
        seconds: until one that does not answer is given up; by default ``MERGEKIT_RAY_WORKER_SECONDS``, or 120.
    """

    def __init__(self, tell: Reporter, seconds: float | None = None) -> None:
        self._tell = tell
        self._seconds = seconds or seconds_of(SECONDS_VARIABLE, _SILENT_SECONDS)
        self._told: set[tuple[str, tuple[str, ...]]] = set()

    def look(self, standings: Sequence[Standing]) -> list[Standing]:
        """The workers to give up now."""
        ended = []
        for standing in standings:
            share = max(standing.silent_seconds, standing.still_seconds / _STILL_TIMES) / self._seconds
            if share > 1 and standing.worker:
                ended.append(standing)
            elif share > _WARN_AFTER and (standing.name, standing.files) not in self._told:
                self._told.add((standing.name, standing.files))
                self._warn(standing)
        return ended

    def _warn(self, standing: Standing) -> None:
        is_silent = standing.silent_seconds > _WARN_AFTER * self._seconds
        what = "has not answered" if is_silent else "has made no progress"
        seconds = standing.silent_seconds if is_silent else standing.still_seconds
        limit = self._seconds if is_silent else self._seconds * _STILL_TIMES
        then = f"; after {limit:.0f} s its shards go to other workers" if standing.worker else ""
        self._tell.event(
            "worker_stalled",
            f"{standing.name} {what} for {seconds:.0f} s on {', '.join(standing.files)}{then}",
            worker=standing.name,
            idle_seconds=round(seconds, 1),
        )


class Pace:
    """How long shards take, and which takes so long that another worker should begin it as well."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._rates: list[float] = []

    def begin(self, shard: Shard, now: float) -> None:
        """A worker is given a shard."""
        self._began.setdefault(shard.file, (now, shard.read_bytes + shard.num_bytes))

    def end(self, file: str, now: float, *, is_written: bool) -> None:
        """No worker has it any more."""
        began, num_bytes = self._began.pop(file)
        if is_written:
            self._rates.append((now - began) / max(1, num_bytes))

    def slowest(self, files: Collection[str], now: float) -> str | None:
        """Which of these is most overdue, by what others took for their bytes; None if none is."""
        if not self._rates:
            return None
        rate = statistics.median(self._rates)
        overdue = {}
        for file in files:
            began, num_bytes = self._began[file]
            expected = max(_LEAST_BACKUP_SECONDS, _SLOW_TIMES * rate * num_bytes)
            if now - began > expected:
                overdue[file] = (now - began) / expected
        return max(overdue, key=lambda file: overdue[file]) if overdue else None
