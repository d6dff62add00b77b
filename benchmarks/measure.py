"""Runs a command and measures it: wall time, CPU time, peak memory of its whole process tree."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run of a command took.

    Attributes:
        wall_seconds: from start to exit, interpreter start-up included.
        cpu_seconds: user and system time of the command and of the children it waited for.
        peak_rss_bytes: highest sum of resident memory over the process tree, as sampled; mapped files count.
        peak_anonymous_bytes: the same of anonymous and shared memory: what cannot be dropped under pressure.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int

    def to_json(self) -> dict[str, float | int]:
        """As plain JSON data."""
        return asdict(self)


class CommandError(RuntimeError):
    """A measured command ended with an error; the message holds the end of its output."""


def measure(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Measurement:
    """Runs ``command`` to its end.

    Args:
        command: program and arguments.
        log: file that receives its stdout and stderr.
        environment: variables set beside the inherited ones.

    Raises:
        CommandError: it exited with another status than 0.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        # wait4 rather than Popen.wait: it gives the resource usage of exactly this child and its descendants.
        _, status, usage = os.wait4(process.pid, 0)
        wall_seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.stop()
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise CommandError(f"{' '.join(command)} exited with {process.returncode}:\n{tail}")
    return Measurement(
        wall_seconds=wall_seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=sampler.peak_rss_bytes,
        peak_anonymous_bytes=sampler.peak_anonymous_bytes,
    )


class _Sampler(threading.Thread):
    """Samples the memory of a process tree until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._ended = threading.Event()
        self.peak_rss_bytes = 0
        self.peak_anonymous_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            samples = [resident_bytes(pid) for pid in process_tree(self._pid)]
            self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for rss, _ in samples))
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, sum(anonymous for _, anonymous in samples))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def process_tree(root: int) -> list[int]:
    """Ids of a process and its descendants now."""
    # The kernel's own list of children: looking through all processes 20 times a second costs a tenth of a core.
    tree = [root]
    for pid in tree:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                tree += map(int, children.read_text().split())
    return tree


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of one process now: ``(all, anonymous and shared)`` in bytes; zeros if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "Rss")))
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    return 1024 * kib.get("VmRSS", 0), 1024 * (kib.get("RssAnon", 0) + kib.get("RssShmem", 0))
