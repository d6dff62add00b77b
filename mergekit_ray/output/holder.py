"""Who holds a lease: which process, on which machine, for how long; and whether it has ended."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

NEVER: Final = -1
"""When a process started that has ended and waits for its parent to notice."""

HELD: Final[set[str]] = set()
"""Tokens of the leases that this process holds."""


@dataclass(frozen=True, slots=True)
class Term:
    """How long a lease lasts.

    Attributes:
        seconds: without renewal.
        renew_seconds: from one renewal to the next.
    """

    seconds: float = 300.0
    renew_seconds: float = 60.0

    @property
    def watch_seconds(self) -> float:
        """For which a lease that looks expired is watched before it is taken."""
        return 1.5 * self.renew_seconds


LONG_TERM: Final = Term(3000.0, 600.0)
"""Where each renewal is a commit, whose number per hour is limited."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease, as its file says.

    Attributes:
        token: drawn for each lease.
        host, pid, user: for people.
        processes: what ``pid`` counts in: this boot of this machine, and the process namespace; None if unknown.
        started: when the process started, in ticks since the boot; None if unknown.
        acquired, renewed: seconds since 1970 by the holder's clock.
        term: of the lease.
        given_up: workers that may write no more.
    """

    token: str
    host: str
    pid: int
    user: str
    processes: str | None
    started: int | None
    acquired: float
    renewed: float
    term: Term
    given_up: tuple[str, ...] = ()

    @classmethod
    def of_this_process(cls, term: Term, now: float) -> Holder:
        """The holder of a lease taken at ``now``, in seconds since 1970."""
        token, host, pid = secrets.token_hex(16), socket.gethostname(), os.getpid()
        return cls(token, host, pid, _user(), _processes(), started_at(pid), now, now, term)

    def to_bytes(self) -> bytes:
        """The file."""
        times = {"acquired": _shown(self.acquired), "renewed": _shown(self.renewed)}
        return (json.dumps({"format": 1, **asdict(self), **times}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder | None:
        """Inverse of `to_bytes`; None for what is no lease of ours."""
        try:
            found = json.loads(data)
            if found.pop("format") != 1:
                return None
            times = {key: datetime.fromisoformat(found[key]).timestamp() for key in ("acquired", "renewed")}
            term = Term(**{key: float(value) for key, value in found["term"].items()})
            given_up = tuple(map(str, found.get("given_up", ())))
            return cls(**{**found, **times, "term": term, "given_up": given_up})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def has_ended(self) -> bool:
        """Whether its process is known to have ended, which only the same machine can know."""
        if self.processes is None or self.processes != _processes():
            return False
        if self.pid == os.getpid() and self.started == started_at(self.pid):
            return self.token not in HELD  # it could not be released
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            pass
        return None not in (found := started_at(self.pid), self.started) and found != self.started

    def __str__(self) -> str:
        return f"{self.user} on {self.host} (process {self.pid}, since {_shown(self.acquired)})"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without an entry, as in many containers
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _processes() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return None


def started_at(pid: int) -> int | None:
    """When a process started, in ticks since the boot; `NEVER`, or None if that is unknown."""
    try:
        # The name of the program, in brackets, may hold anything; the 22nd field is the 20th after it.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return NEVER if state in ("Z", "X") else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
