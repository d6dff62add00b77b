"""What workers count, for whoever shows it: reporters and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass(slots=True)
class Progress:
    """What a worker has done so far, in counters that only grow, and what it holds now.

    ``read_bytes`` counts the inputs of all windows, so that the total is the plan's: bytes held from an earlier window
    count again, though they are read once. ``fetched_bytes`` counts what stores were asked for, without files mapped
    from a disk. ``num_on_cpu`` counts tensors that needed more memory than the device has. ``held_bytes`` is not a
    counter: it is the part of the budget in use.
    """

    read_bytes: int = 0
    fetched_bytes: int = 0
    written_bytes: int = 0
    num_tensors: int = 0
    num_on_cpu: int = 0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    held_bytes: int = 0

    @classmethod
    def total(cls, parts: Iterable[Progress]) -> Progress:
        """The sum of several workers' counters."""
        result = cls()
        for part in parts:
            for counter in fields(cls):
                setattr(result, counter.name, getattr(result, counter.name) + getattr(part, counter.name))
        return result

    def ended(self) -> Progress:
        """Of a worker that is no more: what it has done stays, what it held does not."""
        return replace(self, held_bytes=0)

    def has_moved(self, before: Progress) -> bool:
        """Whether more has been done than ``before``, when perhaps another amount was held."""
        return replace(self, held_bytes=0) != replace(before, held_bytes=0)
