"""Inputs that several output tensors of a shard are made of: eight experts of one model are fetched once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from mergekit_ray.core.expressions import Stored
from mergekit_ray.evaluation.pieces import Bytes
from mergekit_ray.planning.windows import Window, held_bytes
from mergekit_ray.worker.buffers import BufferPool

_BATCHES_IN_WORK = 3
"""One is read, one computed, one written."""


class HeldInputs:
    """What a later window of the same shard reads again, kept while there is room. For one thread: the reader.

    The plan says which runs come again. They may use the memory that batches in work leave, so with a budget that is
    just enough, nothing is held and everything is read again.

    Args:
        batches: all of the shard's, in order.
        limit_bytes: budget for windows and for what is held.
        models: keys of the models whose inputs are worth holding: not those whose files are mapped.
    """

    def __init__(self, batches: Sequence[Sequence[Window]], limit_bytes: int, models: Collection[str]) -> None:
        self._uses: Counter[tuple[Stored, tuple[int, int]]] = Counter()
        self._held: dict[tuple[Stored, tuple[int, int]], Bytes] = {}
        self._room = 0
        self.reserved_bytes = 0
        """Of the budget; the rest is for windows."""
        if not models:
            return
        uses = Counter(run for batch in batches for window in batch for run in window.needs.items())
        self._uses = Counter(
            {
                run: count
                for run, count in uses.items()
                if count > 1 and any(load.model in models for load in run[0].read_from)
            }
        )
        if not self._uses:
            return
        largest = max(sum(window.memory_bytes for window in batch) for batch in batches)
        wanted = sum(_buffer_bytes(leaf, run) for leaf, run in self._uses)
        self.reserved_bytes = self._room = max(0, min(wanted, limit_bytes - _BATCHES_IN_WORK * largest))

    def get(self, leaf: Stored, run: tuple[int, int]) -> tuple[Bytes, bool] | None:
        """A window's input, if it is held, and whether this is its last use: then the buffer is the caller's.

        To be asked exactly once for each input of each window.
        """
        key = (leaf, run)
        if key not in self._uses:
            return None
        self._uses[key] -= 1
        if self._uses[key]:
            found = self._held.get(key)
            return None if found is None else (found, False)
        last = self._held.pop(key, None)
        if last is None:
            return None
        self._room += last.size
        return last, True

    def hold(self, leaf: Stored, run: tuple[int, int], buffer: Bytes) -> bool:
        """Keep the buffer that an input is read into if it is needed again and there is room; whether it is kept."""
        key = (leaf, run)
        if not self._uses[key] or buffer.size > self._room:
            return False
        self._room -= buffer.size
        self._held[key] = buffer
        return True


def _buffer_bytes(leaf: Stored, run: tuple[int, int]) -> int:
    return BufferPool.size_class(held_bytes(leaf, run))
