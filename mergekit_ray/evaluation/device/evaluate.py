"""Evaluation on a device: windows are uploaded while others are computed and others are on their way back.

A window whose bytes fit is *resident*: all of it is uploaded ahead of its turn (`DeviceSession.stage`, on a thread of
its own), so that methods may go over it several times. Of one that does not, runs are uploaded as they are computed
(*streamed*), and again for every pass. Either way results are computed in chunks sized by the memory that is free, and
halved where that turns out not to suffice. A method that needs a whole tensor at once, and more memory than there is,
works on the CPU.

The arithmetic is handed over by one thread, which waits for the device only where a method asks for a number.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Expression, Stored
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.evaluation.budget import Budget
from mergekit_ray.evaluation.device.copies import (
    SLOT_BYTES,
    Download,
    Downloads,
    StreamedPiece,
    Throttle,
    Uploads,
    upload_all,
)
from mergekit_ray.evaluation.device.protocol import Device, Mark
from mergekit_ray.evaluation.evaluate import Evaluation, NonFiniteReport
from mergekit_ray.evaluation.nodes.base import Loaded, Piece
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS

MIN_CHUNK_ELEMENTS: Final = 1 << 16
"""Chunks are not halved below this."""

_USED_PART: Final = 0.8
"""Of the memory that is free at the start. The rest is for what libraries take, and for gaps between allocations."""

_CHUNK_PART: Final = 0.25
"""Of that, for the intermediates of a chunk."""

_MOST_BLOCK_ELEMENTS: Final = 1 << 23
"""Of a block of statistics: enough for a GPU to be busy with it for longer than it takes to ask for it."""

_USUAL_LOADS: Final = 4
"""A base and three models: what blocks are sized for, whatever is merged, so that a session has one size of them."""

_SCRATCH_RUNS: Final = 8
"""Float64 runs that a method takes beside its inputs, about."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A window's inputs on the device, or on their way there.

    Attributes:
        pieces: by load.
        there: the mark from which on they are.
        held_bytes: of the session's budget.
    """

    pieces: Mapping[Stored, Piece]
    there: Mark
    held_bytes: int


class DeviceSession:
    """What one worker does on a device.

    Args:
        device: which.
        host_pool: computes what the device does not.
        budget_bytes: of the device's memory; None for most of what is free.
        num_sharing: sessions that will be open on this device, which share that.
        slot_bytes: of each pinned buffer (`evaluation.device.copies`); no chunk of a result is longer.
    """

    def __init__(
        self,
        device: Device,
        host_pool: ComputePool,
        *,
        budget_bytes: int | None = None,
        num_sharing: int = 1,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self.device = device
        self.host_pool = host_pool
        self.pool = ComputePool(1, device.torch_device)
        self.downloads = Downloads(device, slot_bytes)
        self._uploads = Uploads(device, slot_bytes)
        self._throttle = Throttle(device, self._uploads)
        if budget_bytes is None:
            budget_bytes = int(device.free_bytes() * _USED_PART) // num_sharing
        self._chunk_bytes = int(budget_bytes * _CHUNK_PART)
        self._resident_bytes = budget_bytes - self._chunk_bytes
        self._budget = Budget(self._resident_bytes)
        room = self._chunk_bytes // chunk_bytes(1, _USUAL_LOADS)
        while self.pool.block_elements < _MOST_BLOCK_ELEMENTS and 2 * self.pool.block_elements <= room:
            self.pool.block_elements *= 2

    def stage(
        self, expression: Expression, pieces: Mapping[Stored, Piece], stopped: threading.Event | None = None
    ) -> Staged | None:
        """Upload a window's inputs, once there is room for them beside those of windows before it.

        Args:
            expression: to be evaluated.
            pieces: in host memory, to be kept until the evaluation is finished.
            stopped: ends the wait for room.

        Returns:
            None if they do not fit.
        """
        needed = sum(piece.data.numel() * piece.data.itemsize for piece in pieces.values()) + expression.scratch_bytes
        if needed > self._resident_bytes:
            return None
        self._budget.take(needed, stopped or threading.Event())
        try:
            found, there = upload_all(self.device, self._uploads, pieces)
        except RuntimeError as error:
            self._budget.give(needed)
            if self.device.is_out_of_memory(error):
                return None
            raise
        return Staged(found, there, needed)

    def release(self, staged: Staged) -> None:
        """What was staged is not used any more."""
        self._budget.give(staged.held_bytes)

    def streamed(self, pieces: Mapping[Stored, Piece]) -> Mapping[Stored, Loaded]:
        """Pieces of which runs are uploaded as they are asked for."""
        return {leaf: StreamedPiece(piece, self._throttle) for leaf, piece in pieces.items()}

    def chunk_elements(self, expression: Expression, num_loads: int) -> int:
        """Elements to compute at a time: as many as a pinned buffer brings back, or fewer if there is no room."""
        most = self.downloads.slot_bytes // expression.spec.dtype.itemsize
        room = self._chunk_bytes // chunk_bytes(1, num_loads)
        return min(most, max(MIN_CHUNK_ELEMENTS, 1 << max(0, room.bit_length() - 1)))

    def make_room(self) -> None:
        """Give back memory that is only kept for reuse."""
        self.pool.scratch.clear()
        self.device.give_back_unused()

    def halve_blocks(self) -> bool:
        """Use less memory for statistics from now on; whether that was possible."""
        if self.pool.block_elements == BLOCK_ELEMENTS:
            return False
        self.pool.block_elements //= 2
        return True


def chunk_bytes(num_elements: int, num_loads: int) -> int:
    """About what a chunk takes on the device: every input as it is and widened, and a method's scratch."""
    return num_elements * 8 * (2 * num_loads + _SCRATCH_RUNS)


class DeviceEvaluation:
    """One expression over one window.

    Args:
        session: where.
        expression: to be computed.
        pieces: the bytes of each of its loads, in host memory.
        staged: what `DeviceSession.stage` gave for them.
        allow_non_finite, references: as for `Evaluation`.

    Attributes:
        lacked_memory: whether it needed more memory than the device has, and was computed on the CPU.
    """

    def __init__(
        self,
        session: DeviceSession,
        expression: Expression,
        pieces: Mapping[Stored, Piece],
        staged: Staged | None,
        *,
        allow_non_finite: bool = False,
        references: Mapping[str, str] | None = None,
    ) -> None:
        self._session = session
        self._expression = expression
        self._pieces = pieces
        self._staged = staged
        self._allow_non_finite = allow_non_finite
        self._references = references or {}
        self._made: Evaluation | None = None
        self.lacked_memory = False

    def start(self, start: int, stop: int, out: torch.Tensor, *, is_last: bool = True) -> Callable[[], None]:
        """Hand elements ``[start, stop)`` over to the device, or compute them here.

        Args:
            start: of the window, or of a part of it. Parts are handed over one after the other.
            stop: of the same.
            out: host memory, 1-D of the expression's dtype, filled when what this returns has returned.
            is_last: there is nothing more of the window.

        Returns:
            What waits until the result is there; to be called once, by any thread. It raises as `Evaluation.fill`.

        Raises:
            MergeError: not even the smallest chunk fits in the device's memory; or as `Evaluation`.
        """
        download, is_finite = Download(), torch.ones(1, dtype=torch.bool)
        if self.lacked_memory or not self._on_device(start, stop, out, download, is_finite):
            if not self.lacked_memory:
                self._made = self._evaluation(self._session.host_pool)
            self.lacked_memory = True
            assert self._made is not None
            self._made.fill(start, stop, out)
        if is_last:
            self._made = None
        return functools.partial(self._finish, download, is_finite, is_last=is_last)

    def _finish(self, download: Download, is_finite: torch.Tensor, *, is_last: bool) -> None:
        self._session.downloads.finish(download)
        if self._staged is not None and is_last:
            self._session.release(self._staged)
        if not self._allow_non_finite and not bool(is_finite):
            raise NonFiniteReport(self._expression, self._pieces, self._references, check_finite=True).error()

    def _on_device(self, start: int, stop: int, out: torch.Tensor, download: Download, is_finite: torch.Tensor) -> bool:
        """Whether the device could do it; if not, it is for the CPU."""
        for sources in self._sources():
            while not self._fits(sources, start, stop, out, download, is_finite):
                self._session.make_room()
                if self._expression.access is not Access.REDUCE or not self._session.halve_blocks():
                    break
            else:
                return True
        if self._expression.access is not Access.WHOLE:
            raise self._too_large()
        return False

    def _sources(self) -> Iterator[Callable[[], Mapping[Stored, Loaded]]]:
        """Ways to have the inputs on the device, the best first."""
        if self._staged is not None:
            yield self._resident
        # To stream the inputs of a whole tensor would be to have all of them there in the end.
        if self._expression.access is not Access.WHOLE:
            yield lambda: self._session.streamed(self._pieces)

    def _resident(self) -> Mapping[Stored, Loaded]:
        assert self._staged is not None
        self._session.device.compute.wait(self._staged.there)
        return self._staged.pieces

    def _fits(
        self,
        sources: Callable[[], Mapping[Stored, Loaded]],
        start: int,
        stop: int,
        out: torch.Tensor,
        download: Download,
        is_finite: torch.Tensor,
    ) -> bool:
        """Compute it; whether there was memory enough for that."""
        made, self._made = self._made, None
        try:
            with self._session.device.compute:
                evaluation = made or self._evaluation(self._session.pool, sources())
                self._fill(evaluation, start, stop, out, download)
                assert evaluation.all_finite is not None
                self._session.downloads.fetch(evaluation.all_finite.clone().view(1), is_finite, download)
                self._made = evaluation
        except RuntimeError as error:
            if self._session.device.is_out_of_memory(error):
                return False
            raise
        return True

    def _evaluation(self, pool: ComputePool, sources: Mapping[Stored, Loaded] | None = None) -> Evaluation:
        return Evaluation(
            self._expression,
            self._pieces,
            pool,
            allow_non_finite=self._allow_non_finite,
            references=self._references,
            sources=sources,
            chunk_elements=CHUNK_ELEMENTS if sources is None else None,
        )

    def _fill(self, evaluation: Evaluation, start: int, stop: int, out: torch.Tensor, download: Download) -> None:
        """Chunk by chunk; each is on its way back while the next is computed."""
        session = self._session
        chunk = session.chunk_elements(self._expression, len(self._pieces))
        place = start
        while place < stop:
            end = min(place + chunk, stop)
            run, last_try = out[place - start : end - start], chunk <= MIN_CHUNK_ELEMENTS
            if self._chunk(evaluation, place, end, run, download, last_try=last_try):
                place = end
            else:
                chunk //= 2
                session.make_room()

    def _chunk(
        self, evaluation: Evaluation, start: int, stop: int, out: torch.Tensor, download: Download, *, last_try: bool
    ) -> bool:
        """Whether there was memory enough, which is an error on the last try."""
        session = self._session
        try:
            there = torch.empty(out.numel(), dtype=out.dtype, device=session.device.torch_device)
            evaluation.fill(start, stop, there)
        except RuntimeError as error:
            if last_try or not session.device.is_out_of_memory(error):
                raise
            return False
        session.downloads.fetch(there, out, download)
        return True

    def _too_large(self) -> MergeError:
        device = self._session.device
        needed = chunk_bytes(MIN_CHUNK_ELEMENTS, len(self._pieces))
        return MergeError(
            f"not even runs of {MIN_CHUNK_ELEMENTS} elements (about {format_bytes(needed)}, {needed} bytes) fit in the "
            f"memory of {device.name}, of which {format_bytes(device.free_bytes())} are free",
            where=f"tensor {self._expression.spec.name!r}",
            remedy="let nothing else use the device, or pass `device='cpu'`",
        )
