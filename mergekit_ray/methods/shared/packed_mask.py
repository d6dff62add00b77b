"""Masks over whole tensors that are found once and applied later: a bit per element."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_ray.methods.compiled import is_compiled_for

if TYPE_CHECKING:
    import torch

ALIGNMENT = 8
"""Runs that are packed on their own start at multiples of so many elements."""


def mask_bytes(num_elements: int) -> int:
    """Bytes of a `PackedMask`."""
    return -(-num_elements // ALIGNMENT)


@dataclass(frozen=True, slots=True)
class PackedMask:
    """Which elements of a tensor are kept.

    Attributes:
        bits: uint8; the first element is the highest bit of the first byte.
    """

    bits: torch.Tensor

    @classmethod
    def join(cls, runs: Iterable[torch.Tensor]) -> PackedMask:
        """The mask of a tensor from what `pack` gave for consecutive runs; all but the last are of whole bytes."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        return cls(torch.cat(list(runs)))

    def unpack(self, start: int, num_elements: int) -> torch.Tensor:
        """1 where an element of a run is kept, 0 elsewhere: uint8.

        Args:
            start: flat index of the run's first element.
            num_elements: of the run.
        """
        import torch  # noqa: PLC0415

        first, skipped = divmod(start, ALIGNMENT)
        run = self.bits[first : -(-(start + num_elements) // ALIGNMENT)]
        if run.device.type == "cpu":
            import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

            unpacked = torch.from_numpy(np.unpackbits(run.numpy()))
        else:
            unpacked = unpack_by_torch(run)
        return unpacked[skipped : skipped + num_elements]

    def trim_(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Zero what is not kept, in place.

        Args:
            values: 1-D run.
            start: flat index of its first element.
        """
        return trim_(values, self.unpack(start, values.numel()))


class MaskBuilder:
    """A mask that is filled run by run, from any thread.

    Into one buffer: a tensor for each run, made while larger ones come and go, would keep the heap from taking up again
    what those leave, which has cost more memory than the inputs.

    Args:
        num_elements: of the tensor.
    """

    def __init__(self, num_elements: int) -> None:
        self._num_bytes = -(-num_elements // ALIGNMENT)
        self._bits: torch.Tensor | None = None
        self._lock = threading.Lock()

    def put(self, kept: torch.Tensor, start: int) -> None:
        """Take up a run.

        Args:
            kept: zeros and ones of uint8, on the device where the mask is to be.
            start: flat index of its first element, a multiple of 8.
        """
        bits = pack(kept)
        with self._lock:
            if self._bits is None:
                self._bits = bits.new_zeros(self._num_bytes)
        first = start // ALIGNMENT
        self._bits[first : first + bits.numel()] = bits

    def mask(self) -> PackedMask | None:
        """The mask, once all runs are there; None if there was none."""
        return None if self._bits is None else PackedMask(self._bits)


def trim_(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Zero ``values`` where ``kept``, uint8, is 0, in place."""
    if is_compiled_for(values):
        from mergekit_ray.methods.compiled import selection  # noqa: PLC0415 - compilers load where they are needed

        selection.keep_flagged(values.numpy(), kept.numpy())
        return values
    return values.masked_fill_(kept == 0, 0.0)


def pack(kept: torch.Tensor) -> torch.Tensor:
    """Zeros and ones of uint8, eight to a byte; the last byte is filled up with zeros."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    if kept.device.type == "cpu":
        import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

        return torch.from_numpy(np.packbits(kept.numpy()))
    return pack_by_torch(kept)


def pack_by_torch(kept: torch.Tensor) -> torch.Tensor:
    """`pack` on any device."""
    import torch  # noqa: PLC0415

    padded = torch.nn.functional.pad(kept, (0, -kept.numel() % ALIGNMENT)).view(-1, ALIGNMENT)
    return (padded << _shifts(kept)).sum(dim=1, dtype=torch.uint8)


def unpack_by_torch(bits: torch.Tensor) -> torch.Tensor:
    """The zeros and ones of whole bytes, on any device."""
    return (bits.unsqueeze(1) >> _shifts(bits)).bitwise_and_(1).view(-1)


def _shifts(like: torch.Tensor) -> torch.Tensor:
    import torch  # noqa: PLC0415

    return torch.arange(ALIGNMENT - 1, -1, -1, dtype=torch.uint8, device=like.device)
