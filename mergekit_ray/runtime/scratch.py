"""Reused working memory: page faults of fresh buffers cost more than the arithmetic done in them."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import torch

from mergekit_ray.core.dtypes import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.BOOL: torch.bool,
    DType.U8: torch.uint8,
    DType.I8: torch.int8,
    DType.U16: torch.uint16,
    DType.I16: torch.int16,
    DType.U32: torch.uint32,
    DType.I32: torch.int32,
    DType.U64: torch.uint64,
    DType.I64: torch.int64,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
}
"""torch's names for safetensors' dtypes."""


class ThreadScratch:
    """Working tensors of one thread, handed out like a stack.

    Buffers of one dtype are kept and reused in the order they are asked for, so a loop over chunks touches the same
    memory in each turn. `mark` and `release` bracket a use; what was handed out between them is free again afterwards.

    Args:
        device: where the tensors are; None for the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        self._used: dict[torch.dtype, int] = defaultdict(int)

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised 1-D tensor."""
        pool, index = self._buffers[dtype], self._used[dtype]
        self._used[dtype] = index + 1
        if index == len(pool):
            pool.append(torch.empty(num_elements, dtype=dtype, device=self._device))
        elif pool[index].numel() < num_elements:
            pool[index] = torch.empty(num_elements, dtype=dtype, device=self._device)
        return pool[index][:num_elements]

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor of the shape of ``x``, in ``dtype`` or that of ``x``."""
        return self.take(x.numel(), dtype or x.dtype).view(x.shape)

    def clear(self) -> None:
        """Let go of all memory; nothing that was handed out may be in use."""
        self._buffers.clear()
        self._used.clear()

    def mark(self) -> dict[torch.dtype, int]:
        """The current height of the stack."""
        return dict(self._used)

    def release(self, mark: dict[torch.dtype, int]) -> None:
        """Go back to a height given by `mark`."""
        for dtype in self._used:
            self._used[dtype] = mark.get(dtype, 0)


class BufferPool:
    """Byte buffers for inputs and outputs, reused by size class.

    Sizes are rounded up to eighths of a power of two, so that a buffer is at most an eighth larger than asked for.
    Idle buffers of other sizes are let go, the oldest first, when a new one would take the pool over its limit.

    Args:
        limit_bytes: what buffers in use and idle ones may take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._idle: list[torch.Tensor] = []
        self._total_bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def size_class(num_bytes: int) -> int:
        """Bytes really taken for a buffer of ``num_bytes``."""
        step = max(4096, 1 << max(0, (num_bytes - 1).bit_length() - 4))
        return max(step, -(-num_bytes // step) * step)

    def take(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor of at least ``num_bytes``, to be given back with `give`."""
        size = self.size_class(num_bytes)
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i].numel() == size:
                    return self._idle.pop(i)
            while self._idle and self._total_bytes + size > self._limit_bytes:
                self._total_bytes -= self._idle.pop(0).numel()
            self._total_bytes += size
        # numpy asks for huge pages (a 512th of the page faults); torch does so only if its environment says.
        return torch.from_numpy(np.empty(size, dtype=np.uint8))

    def give(self, buffer: torch.Tensor) -> None:
        """Return a buffer; its content may be overwritten from now on."""
        with self._lock:
            self._idle.append(buffer)
