"""What goes wrong with any store, and the messages for it."""

from __future__ import annotations

from typing import Final

from mergekit_ray.core.errors import CheckpointError, StorageError

TRANSIENT_STATUS: Final = {408, 429, 500, 502, 503, 504}
"""Of HTTP answers: the same request may succeed if it is sent again."""


FULL_STATUS: Final = 507
"""Of HTTP answers: the store is full, and retrying makes no room."""


class ShortBodyError(OSError):
    """An answer that ended before it was complete."""


def missing(where: str) -> CheckpointError:
    """There is no file there."""
    return CheckpointError("no such file", where=where)


def changed(where: str, remedy: str = "let nothing write to the inputs, and start the merge again") -> CheckpointError:
    """A file is at another version than was asked for."""
    return CheckpointError(
        "changed while it was being read: it is no longer the file that was planned for", where=where, remedy=remedy
    )


def full(what: str, where: str, remedy: str = "free some space or choose another place") -> StorageError:
    """There is no room, or a quota is used up. Waiting does not help, so the merge ends at once."""
    return StorageError(what, where=where, remedy=f"{remedy}, and run again to resume", retryable=False)


def discarded(where: str) -> StorageError:
    """A prepared file is gone before its commit: a driver that takes the lease over discards such files."""
    return StorageError(
        "somebody removed it while it was being written",
        where=where,
        remedy="let only one merge write there, and run again to resume",
    )


def wrong_size(num_bytes: int, num_announced: int, where: str) -> StorageError:
    """A file that is written has more or fewer bytes than its writer had said."""
    return StorageError(
        f"{num_bytes} bytes were written where {num_announced} were announced",
        where=where,
        remedy="this is a fault of the writer: please report it",
    )


def failed(doing: str, num_attempts: int) -> str:
    """What a request that failed was for, and how often it was sent."""
    return f"{doing} failed" + (f" after {num_attempts} attempts" if num_attempts > 1 else "")


def is_untrusted(error: Exception) -> bool:
    """Whether the server's certificate is not one that this machine trusts."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def untrusted(what: str, where: str, variable: str) -> StorageError:
    """The error for such a server; ``variable`` of the environment names the authorities that are trusted."""
    return StorageError(
        f"{what}: no secure connection",
        where=where,
        remedy=f"the server's certificate is not trusted: name its authority's file in {variable}",
        retryable=False,
    )
