"""Reused working tensors: page faults of fresh ones cost more than the arithmetic done in them."""

from __future__ import annotations

from collections import defaultdict

import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.evaluation.pieces import Bytes

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


def as_tensor(data: Bytes, dtype: DType) -> torch.Tensor:
    """Bytes in host memory as a 1-D tensor of a dtype, sharing them."""
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype])


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

    @property
    def held_elements(self) -> dict[torch.dtype, int]:
        """Of each dtype, in use or not."""
        return {dtype: sum(buffer.numel() for buffer in held) for dtype, held in self._buffers.items()}

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
