"""Copies between host memory and a device, a few at a time, that overlap each other and the arithmetic.

A device copies by itself only from and to pinned memory. So what lies elsewhere (files in the page cache, buffers of a
reader) goes through a few pinned buffers that are used in turn: while one is being copied by the device, the next is
being filled or emptied by this process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from mergekit_ray.core.expressions import Stored
from mergekit_ray.evaluation.device.protocol import Device, Mark
from mergekit_ray.evaluation.nodes.base import Piece

SLOT_BYTES: Final = 16 << 20
"""Of a pinned buffer: enough for a bus to reach its rate, and little beside a worker's budget."""

NUM_SLOTS: Final = 3
"""Pinned buffers in each direction: one being filled, one being copied, one to spare."""

_AHEAD_SLOTS: Final = 4
"""How far uploads may run ahead of the arithmetic that asked for them, in buffers."""


@dataclass(slots=True)
class _Slot:
    buffer: torch.Tensor
    busy: Mark | None = None

    def of(self, like: torch.Tensor) -> torch.Tensor:
        """Room for a run of elements like these."""
        return self.buffer[: like.numel() * like.itemsize].view(like.dtype)


class Uploads:
    """Host tensors to the device, through pinned buffers in turn. May be used by several threads.

    Args:
        device: to copy to.
        slot_bytes: of a pinned buffer.
    """

    def __init__(self, device: Device, slot_bytes: int = SLOT_BYTES) -> None:
        self._device = device
        self._slot_bytes = slot_bytes
        self._slots: deque[_Slot] = deque()
        self._lock = threading.Lock()

    def send(self, source: torch.Tensor) -> tuple[torch.Tensor, Mark]:
        """A copy on the device, and the mark after which it is complete.

        It may be used on the lane of arithmetic once that lane waits for the mark; `Device.lend` is done.

        Args:
            source: 1-D, in any host memory. It may be overwritten once this returns.
        """
        with self._lock:
            with self._device.uploads:
                target = torch.empty(source.numel(), dtype=source.dtype, device=self._device.torch_device)
            step = max(1, self._slot_bytes // source.itemsize)
            for start in range(0, source.numel(), step):
                run = source[start : start + step]
                slot = self._next()
                pinned = slot.of(run)
                pinned.copy_(run)
                self._device.uploads.copy(target[start : start + step], pinned)
                slot.busy = self._device.uploads.mark()
            mark = self._device.uploads.mark()
        self._device.lend(target, self._device.compute)
        return target, mark

    def _next(self) -> _Slot:
        """The pinned buffer that was used longest ago, once it has been copied."""
        if len(self._slots) < NUM_SLOTS:
            self._slots.append(_Slot(self._device.host_buffer(self._slot_bytes)))
            return self._slots[-1]
        self._slots.rotate(-1)
        slot = self._slots[-1]
        if slot.busy is not None:
            slot.busy.wait()
        return slot


@dataclass(slots=True)
class Download:
    """What a part of a window has asked to be brought back.

    Attributes:
        num_missing: runs that are not in host memory yet.
    """

    num_missing: int = 0


@dataclass(slots=True)
class _Arriving:
    download: Download
    slot: _Slot
    done: Mark
    target: torch.Tensor


class Downloads:
    """Device tensors to host memory, through pinned buffers in turn. May be used by several threads.

    Args:
        device: to copy from.
        slot_bytes: of a pinned buffer; no run may be longer.
    """

    def __init__(self, device: Device, slot_bytes: int = SLOT_BYTES) -> None:
        self._device = device
        self.slot_bytes = slot_bytes
        self._free: list[_Slot] = []
        self._num_slots = 0
        self._arriving: deque[_Arriving] = deque()
        self._lock = threading.Lock()

    def fetch(self, source: torch.Tensor, target: torch.Tensor, download: Download) -> None:
        """Copy the result of the arithmetic queued so far. Waits only for a free buffer.

        Args:
            source: 1-D, on the device; not to be written to any more.
            target: 1-D host memory. It is there once `finish` has returned.
            download: what it belongs to.
        """
        with self._lock:
            slot = self._slot()
            lanes = self._device
            lanes.downloads.wait(lanes.compute.mark())
            lanes.lend(source, lanes.downloads)
            lanes.downloads.copy(slot.of(source), source)
            self._arriving.append(_Arriving(download, slot, lanes.downloads.mark(), target))
            download.num_missing += 1

    def finish(self, download: Download) -> None:
        """Wait until all that was asked for is in host memory."""
        while True:
            with self._lock:
                if not download.num_missing:
                    return
                self._receive()

    def _slot(self) -> _Slot:
        if not self._free and self._num_slots < NUM_SLOTS:
            self._free.append(_Slot(self._device.host_buffer(self.slot_bytes)))
            self._num_slots += 1
        if not self._free:
            self._receive()
        return self._free.pop()

    def _receive(self) -> None:
        """Wait for what was asked for first, and bring it where it belongs."""
        first = self._arriving.popleft()
        first.done.wait()
        first.target.copy_(first.slot.of(first.target))
        self._free.append(first.slot)
        first.download.num_missing -= 1


class StreamedPiece:
    """A leaf's bytes in host memory, of which runs are uploaded as they are asked for.

    Args:
        piece: the bytes.
        throttle: shared by all pieces that one thread asks for runs of.
    """

    def __init__(self, piece: Piece, throttle: Throttle) -> None:
        self._piece = piece
        self._throttle = throttle

    @property
    def start(self) -> int:
        """See `Loaded.start`."""
        return self._piece.start

    def run(self, start: int, stop: int) -> torch.Tensor:
        """See `Loaded.run`."""
        return self._throttle.send(self._piece.run(start, stop))


class Throttle:
    """Uploads that do not run away from the arithmetic: what they hold on the device stays bounded.

    Args:
        device: to copy to.
        uploads: the way there.
        limit_bytes: of what was uploaded and may not have been used yet.
    """

    def __init__(self, device: Device, uploads: Uploads, limit_bytes: int = _AHEAD_SLOTS * SLOT_BYTES) -> None:
        self._device = device
        self._uploads = uploads
        self._limit_bytes = limit_bytes
        self._ahead: deque[tuple[int, Mark]] = deque()
        self._ahead_bytes = 0

    def send(self, source: torch.Tensor) -> torch.Tensor:
        """A copy on the device, which the arithmetic handed over from now on waits for."""
        num_bytes = source.numel() * source.itemsize
        while self._ahead and self._ahead_bytes + num_bytes > self._limit_bytes:
            earlier, mark = self._ahead.popleft()
            mark.wait()
            self._ahead_bytes -= earlier
        target, there = self._uploads.send(source)
        self._device.compute.wait(there)
        self._ahead.append((num_bytes, self._device.compute.mark()))
        self._ahead_bytes += num_bytes
        return target


def upload_all(device: Device, uploads: Uploads, pieces: Mapping[Stored, Piece]) -> tuple[dict[Stored, Piece], Mark]:
    """All pieces on the device, and the mark from which on they are there."""
    found = {leaf: Piece(uploads.send(piece.data)[0], piece.start) for leaf, piece in pieces.items()}
    return found, device.uploads.mark()
