"""The threads that share the arithmetic of one worker."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar, cast

from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch

    from mergekit_ray.evaluation.scratch import ThreadScratch

R = TypeVar("R")

CHUNK_ELEMENTS: Final = 1 << 18
"""Elements handled at a time: 1 MiB per float32 buffer. Of 2^16 to 2^20, measured on two cores with dare_ties,
2^18 and 2^19 took the least time; smaller ones spend it on waiting for the interpreter, larger ones on memory."""

_RUNS_PER_THREAD: Final = 4
"""So that a thread that is behind, since others want its core, keeps them all waiting for a short time only."""


class ComputePool:
    """Threads that share the arithmetic of one process, each with its own scratch.

    torch's own intra-op threads are switched off inside (one pool, no oversubscription). It is imported for what uses
    ``device`` or ``scratch`` only.

    Args:
        num_threads: of the pool. One thread is the caller's own.
        device: where scratch is, and so where the arithmetic is done; None for the CPU. A device is one thread's: its
            work is only handed to it there.

    Attributes:
        block_elements: see `mergekit_ray.methods.shared.protocol.Operands`.
    """

    def __init__(self, num_threads: int, device: torch.device | None = None) -> None:
        self._device = device
        self.num_threads = max(1, num_threads)
        self.block_elements = BLOCK_ELEMENTS
        self._executor = ThreadPoolExecutor(self.num_threads, thread_name_prefix="compute") if num_threads > 1 else None
        self._local = threading.local()

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        if self._device is None:
            import torch  # noqa: PLC0415 - not all arithmetic needs it

            self._device = torch.device("cpu")
        return self._device

    @property
    def scratch(self) -> ThreadScratch:
        """The calling thread's scratch."""
        scratch = getattr(self._local, "scratch", None)
        if scratch is None:
            from mergekit_ray.evaluation.scratch import ThreadScratch  # noqa: PLC0415 - imports torch

            scratch = self._local.scratch = ThreadScratch(self.device)
        return cast("ThreadScratch", scratch)

    def map_runs(self, num_items: int, function: Callable[[int, int], R]) -> list[R]:
        """``function(first, last)`` over a few contiguous runs of ``range(num_items)``; results in order."""
        num_runs = min(_RUNS_PER_THREAD * self.num_threads, num_items)
        if num_runs <= 1 or self._executor is None:
            return [function(0, num_items)] if num_items else []
        bounds = [num_items * i // num_runs for i in range(num_runs + 1)]
        futures = [self._executor.submit(function, a, b) for a, b in itertools.pairwise(bounds)]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        if self._executor is not None:
            self._executor.shutdown()
