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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.sums import partial_sums

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mergekit_ray.methods.shared.scratch import Scratch

    Words = np.ndarray[Any, np.dtype[np.uint32]]

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

    @property
    def drops_some(self) -> bool:
        """Whether some elements are kept and others are not."""
        return 0 < self.limit < 1 << 32

    @property
    def limit(self) -> int:
        """What a word must be below for its element to be kept: 0 keeps nothing, 2^32 all."""
        return min(max(0, math.floor(self.density * (1 << 32))), 1 << 32)

    def apply_(self, values: torch.Tensor, start: int, space: MaskSpace) -> torch.Tensor:
        """Zero what is not kept, in place.

        Args:
            values: 1-D run of floating numbers.
            start: flat index of its first element.
            space: working memory for a run of that length.
        """
        if self.keeps_all:
            return values
        limit = self.limit
        if not limit:
            return values.zero_()
        if is_compiled_for(values):
            from mergekit_ray.methods.compiled import masks  # noqa: PLC0415 - compilers load where they are needed

            masks.drop(values.numpy(), *stream(self.key, start, values.numel()), limit)
            return values
        words = hash_words(self.key, start, space.words, space.spare)
        return _zero_where_not_(values, words.lt_(limit - (1 << 31)))

    def l1_sums(self, values: torch.Tensor, start: int, space: MaskSpace) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums of ``|v|``, of all values and of those that are kept: float64, on the values' device.

        Args:
            values: as for `apply_`; overwritten.
            start: as for `apply_`.
            space: as for `apply_`.
        """
        import torch  # noqa: PLC0415 - declarations are read without torch

        if is_compiled_for(values) and self.drops_some:
            from mergekit_ray.methods.compiled import masks  # noqa: PLC0415 - compilers load where they are needed

            whole, kept = masks.masked_norms(values.numpy(), *stream(self.key, start, values.numel()), self.limit)
            return torch.tensor([whole], dtype=torch.float64), torch.tensor([kept], dtype=torch.float64)
        magnitudes = values.abs_()
        wide = magnitudes if magnitudes.dtype == torch.float64 else torch.empty_like(magnitudes, dtype=torch.float64)
        sums = partial_sums(magnitudes, wide)
        return sums, partial_sums(self.apply_(magnitudes, start, space), wide)


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
    if out.device.type == "cpu":
        import numpy as np  # noqa: PLC0415

        from mergekit_ray.methods.compiled import masks  # noqa: PLC0415 - compilers load where they are needed

        masks.fill_words(out.numpy().view(np.uint32), *stream(key, start, out.numel()))
        return out
    return words_by_torch(key, start, out, scratch)


def words_by_torch(key: str, start: int, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`hash_words` by torch's operations, on any device."""
    import torch  # noqa: PLC0415

    table = _mixed_offsets_on(out.device)
    for place, block, first, length in _runs(start, out.numel()):
        rows = max(1, length // HASH_BLOCK)
        shape = (rows, length // rows)
        x = out[place : place + length].view(shape)
        shifted = scratch[place : place + length].view(shape)
        # A few bytes from memory that is not pinned: copied before this returns, without waiting for the device.
        keys = torch.from_numpy(block_keys(key, block, rows).view("int32")).to(out.device, non_blocking=True)
        torch.add(table[None, first : first + shape[1]], keys[:, :1], out=x)
        _fold_(x, shifted, _SHIFT_1)
        x.mul_(_MULTIPLIER_1).add_(keys[:, 1:])
        _fold_(x, shifted, _SHIFT_2)
        x.mul_(_MULTIPLIER_2)
    return out


def stream(key: str, start: int, length: int) -> tuple[int, Words, Words]:
    """What a compiled loop needs: the offset in the first block, the mixed offsets, the blocks' key words.

    Args:
        key: names the stream.
        start: flat index of the first element.
        length: elements.
    """
    first, offset = divmod(start, HASH_BLOCK)
    num_blocks = -(-(offset + length) // HASH_BLOCK)
    return offset, mixed_offsets(), block_keys(key, first, num_blocks)


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


def block_keys(key: str, first: int, num_blocks: int) -> Words:
    """The two key words of consecutive blocks, ``[num_blocks, 2]``."""
    import numpy as np  # noqa: PLC0415

    digest = hashlib.sha256(key.encode()).digest()
    blocks = (
        hashlib.sha256(digest + index.to_bytes(8, "little")).digest()[:8] for index in range(first, first + num_blocks)
    )
    return np.frombuffer(b"".join(blocks), dtype="<u4").astype(np.uint32).reshape(num_blocks, 2)


@functools.cache
def mixed_offsets() -> Words:
    """lowbias32 of all offsets in a block."""
    import numpy as np  # noqa: PLC0415

    x = np.arange(HASH_BLOCK, dtype=np.uint32)
    x ^= x >> _SHIFT_1
    x *= np.uint32(_MULTIPLIER_1)
    x ^= x >> _SHIFT_2
    x *= np.uint32(_MULTIPLIER_2 & 0xFFFFFFFF)
    x ^= x >> _SHIFT_3
    return x


@functools.lru_cache(maxsize=16)
def _mixed_offsets_on(device: torch.device) -> torch.Tensor:
    """`mixed_offsets` where they are needed, as signed numbers. Copied: there when this returns, for any stream."""
    import torch  # noqa: PLC0415

    return torch.from_numpy(mixed_offsets().view("int32")).to(device)
