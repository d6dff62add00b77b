"""How an operation is run, as the command line's options and Python's arguments have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run. Of this only ``device`` may change the bytes written, by the last bit of some elements.

    Attributes:
        executor: ``local`` threads, ``ray`` actors, or None: Ray inside a Ray job or when an address is given.
        address: of the Ray cluster.
        num_workers: shards in work at a time; None for `executors.local.local_workers`, and as many as the CPUs allow
            on Ray.
        memory_bytes: budget of each worker; None for what the plan needs to overlap its work.
        overwrite: replace another model that is at the output.
        allow_non_finite: let NaN and infinities pass.
        chunk_elements: elements computed at a time on the CPU; None for the default.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, or one of them as ``cuda:1``.
    """

    executor: Literal["local", "ray"] | None = None
    address: str | None = None
    num_workers: int | None = None
    memory_bytes: int | None = None
    overwrite: bool = False
    allow_non_finite: bool = False
    chunk_elements: int | None = None
    device: str = "auto"
