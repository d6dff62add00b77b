"""Random masks that are a pure function of a key and an element's index.

The same element gets the same answer on any device, for any chunk size, number of workers, order or retry; there is no
generator whose state could differ.

A 32-bit word per element: flat indices are cut into blocks of 2^16. For each block, SHA-256 of the key's digest and the
block number gives two words ``a`` and ``b``; for the offset ``i`` within the block

    x = mix(i) + a;  x ^= x >> 16;  x *= 0x7feb352d;  x += b;  x ^= x >> 15;  x *= 0x846ca68b    (mod 2^32, >> logical)

where ``mix`` is the full lowbias32 hash, tabulated once. Together that is two rounds of lowbias32 around a key, less
the last shift, which moves low bits only; an element is kept if ``x + 2^31 (mod 2^32) < ⌊density · 2^32⌋`` (the offset
makes it one signed comparison). Constants: C. Wellons, "Prospecting for Hash Functions",
https://nullprogram.com/blog/2018/07/31/ (public domain).
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_ray.methods.protocol import Scratch

if TYPE_CHECKING:
    import numpy as np
    import torch

    Words = np.ndarray[Any, np.dtype[Any]]
    PackedMask = np.ndarray[Any, np.dtype[np.uint8]]

HASH_BLOCK = 1 << 16
"""Elements that share the two key words. Part of the definition of the masks: not tied to `BLOCK_ELEMENTS`."""

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit number, which torch's int32 wants
_SHIFT_1, _SHIFT_2, _SHIFT_3 = 16, 15, 16


@dataclass(frozen=True, slots=True)
class MaskSpace:
    """Two runs of int32, reused from mask to mask."""

    words: torch.Tensor
    spare: torch.Tensor

    @classmethod
    def like(cls, run: torch.Tensor, scratch: Scratch) -> MaskSpace:
        """Space for masks of runs such as ``run``."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        return cls(scratch.like(run, torch.int32), scratch.like(run, torch.int32))


@dataclass(frozen=True, slots=True)
class RandomMask:
    """Keeps each element with probability ``density``, independently.

    Attributes:
        key: seeds it; different keys give independent masks.
        density: probability of being kept; 1 or more keeps all, 0 or less none.
    """

    key: str
    density: float

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return self.density >= 1.0

    def apply_(self, values: torch.Tensor, start: int, space: MaskSpace) -> torch.Tensor:
        """Zero what is not kept, in place.

        Args:
            values: 1-D run of floating numbers.
            start: flat index of its first element.
            space: working memory for a run of that length.
        """
        if self.keeps_all:
            return values
        limit = math.floor(self.density * (1 << 32))
        if limit <= 0:
            return values.zero_()
        words = hash_words(self.key, start, space.words, space.spare)
        return _zero_where_not_(values, words.lt_(limit - (1 << 31)))

    def apply_and_pack_(self, values: torch.Tensor, start: int, space: MaskSpace) -> PackedMask:
        """As `apply_`, on the CPU; returns the mask in a bit per element, to be applied again with `apply_packed_`.

        The mask must be one that drops some elements and keeps some.
        """
        import numpy as np  # noqa: PLC0415 - imported where it works, as torch is
        import torch  # noqa: PLC0415

        words = hash_words(self.key, start, space.words, space.spare)
        kept = space.spare.numpy().view(np.bool_)[: values.numel()]
        np.less(words.numpy(), math.floor(self.density * (1 << 32)) - (1 << 31), out=kept)
        _keep_(values, torch.from_numpy(kept.view(np.uint8)), space)
        return np.packbits(kept)


def apply_packed_(values: torch.Tensor, packed: PackedMask, space: MaskSpace) -> torch.Tensor:
    """Zero what a mask of `RandomMask.apply_and_pack_` drops, in place; the run must be the same."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    return _keep_(values, torch.from_numpy(np.unpackbits(packed, count=values.numel())), space)


def _keep_(values: torch.Tensor, kept: torch.Tensor, space: MaskSpace) -> torch.Tensor:
    """Zero ``values`` where ``kept``, of bytes 0 and 1 (torch converts booleans nine times slower), is 0."""
    import torch  # noqa: PLC0415

    if values.dtype != torch.float32:
        return _zero_where_not_(values, space.words.copy_(kept))
    # One operation less than on the bits; a dropped negative number becomes -0.0, which no sum can tell from 0.0.
    return values.mul_(space.words.view(torch.float32).copy_(kept))


def _zero_where_not_(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero ``values`` where the int32 ``mask`` is 0 (elsewhere it is 1); ``mask`` is overwritten."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    # All ones where kept, all zeros elsewhere: `and` on the bits of the values.
    same_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    values.view(same_width).bitwise_and_(mask.neg_().to(same_width))
    return values


def hash_words(key: str, start: int, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """One 32-bit word for each element ``[start, start + len(out))`` of the stream ``key``.

    Args:
        key: names the stream.
        start: flat index of the first element, of any size.
        out: 1-D int32, filled.
        scratch: int32 of the same length.
    """
    import torch  # noqa: PLC0415

    digest = hashlib.sha256(key.encode()).digest()
    table = _mixed_offsets(out.device)
    for place, block, first, length in _runs(start, out.numel()):
        rows = max(1, length // HASH_BLOCK)
        shape = (rows, length // rows)
        x = out[place : place + length].view(shape)
        shifted = scratch[place : place + length].view(shape)
        addend_1, addend_2 = _block_words(digest, block, rows, out.device)
        if out.device.type == "cpu":
            columns = [a if isinstance(a, int) else a.numpy() for a in (addend_1, addend_2)]
            _hash_with_numpy(table[None, first : first + shape[1]].numpy(), columns, x.numpy(), shifted.numpy())
            continue
        torch.add(table[None, first : first + shape[1]], addend_1, out=x)
        _fold_(x, shifted, _SHIFT_1)
        x.mul_(_MULTIPLIER_1).add_(addend_2)
        _fold_(x, shifted, _SHIFT_2)
        x.mul_(_MULTIPLIER_2)
    return out


def _hash_with_numpy(table: Words, addends: Sequence[int | Words], out: Words, scratch: Words) -> None:
    """The same integers as by torch: numpy has unsigned numbers, whose shifts are logical: two operations less."""
    import numpy as np  # noqa: PLC0415

    x, shifted = out.view(np.uint32), scratch.view(np.uint32)
    first, second = (np.asarray(a, dtype=np.int32).view(np.uint32) for a in addends)
    np.add(table.view(np.uint32), first, out=x)
    np.right_shift(x, np.uint32(_SHIFT_1), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, np.uint32(_MULTIPLIER_1), out=x)
    np.add(x, second, out=x)
    np.right_shift(x, np.uint32(_SHIFT_2), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, np.uint32(_MULTIPLIER_2 % (1 << 32)), out=x)


def _fold_(x: torch.Tensor, scratch: torch.Tensor, shift: int) -> None:
    """``x ^= x >> shift`` with a logical shift (torch's int32 shift is arithmetic)."""
    import torch  # noqa: PLC0415

    torch.bitwise_right_shift(x, shift, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _runs(start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """``(place in the run, block, offset in the block, length)``: parts of blocks, and whole blocks together."""
    place = 0
    while place < length:
        block, first = divmod(start + place, HASH_BLOCK)
        left = length - place
        run = left // HASH_BLOCK * HASH_BLOCK if first == 0 and left >= HASH_BLOCK else min(left, HASH_BLOCK - first)
        yield place, block, first, run
        place += run


def _block_words(
    digest: bytes, block: int, num_blocks: int, device: torch.device
) -> tuple[int | torch.Tensor, int | torch.Tensor]:
    """The two key words of consecutive blocks: numbers for one block, columns for several."""
    import torch  # noqa: PLC0415

    words = [
        struct.unpack_from("<ii", hashlib.sha256(digest + index.to_bytes(8, "little")).digest())
        for index in range(block, block + num_blocks)
    ]
    if num_blocks == 1:
        return words[0]
    columns = torch.tensor(words, dtype=torch.int32, device=device)
    return columns[:, :1], columns[:, 1:]


@functools.lru_cache(maxsize=16)
def _mixed_offsets(device: torch.device) -> torch.Tensor:
    """lowbias32 of all offsets in a block."""
    import torch  # noqa: PLC0415

    x = torch.arange(HASH_BLOCK, dtype=torch.int32, device=device)
    scratch = torch.empty_like(x)
    _fold_(x, scratch, _SHIFT_1)
    x.mul_(_MULTIPLIER_1)
    _fold_(x, scratch, _SHIFT_2)
    x.mul_(_MULTIPLIER_2)
    _fold_(x, scratch, _SHIFT_3)
    return x
