"""CUDA: streams, events, pinned memory. The only module that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self, cast

import torch

if TYPE_CHECKING:
    from mergekit_ray.evaluation.device.protocol import Lane, Mark

_CUDA: Final[Any] = torch.cuda
"""Its classes are not annotated."""

_OUT_OF_MEMORY: Final = ("out of memory", "ALLOC_FAILED")
"""In the messages of libraries beside torch's allocator: cuBLAS and cuSOLVER take workspaces of their own."""


class CudaMark:
    """An event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """See `Mark.wait`."""
        self.event.synchronize()


class CudaLane:
    """A stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _CUDA.Stream(device)
        self._entered: list[Any] = []

    def __enter__(self) -> Self:
        """See `Lane.__enter__`. A lane is entered by one thread at a time."""
        context = _CUDA.stream(self.stream)
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, *args: object) -> None:
        """See `Lane.__exit__`."""
        self._entered.pop().__exit__(None, None, None)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Lane.copy`."""
        with _CUDA.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> CudaMark:
        """See `Lane.mark`."""
        return CudaMark(self.stream.record_event(_CUDA.Event(blocking=True)))

    def wait(self, mark: Mark) -> None:
        """See `Lane.wait`."""
        self.stream.wait_event(cast(CudaMark, mark).event)


class CudaDevice:
    """One GPU, see `mergekit_ray.evaluation.device.protocol.Device`.

    Args:
        name: ``cuda:N``.
    """

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.name = f"{name} ({torch.cuda.get_device_name(self.torch_device)})"
        self.uploads, self.compute, self.downloads = (CudaLane(self.torch_device) for _ in range(3))

    def free_bytes(self) -> int:
        """See `Device.free_bytes`: of the GPU, and what torch keeps of it for reuse."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + kept

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """See `Device.host_buffer`."""
        with _CUDA.device(self.torch_device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def lend(self, tensor: torch.Tensor, lane: Lane) -> None:
        """See `Device.lend`."""
        tensor.record_stream(cast(CudaLane, lane).stream)

    def give_back_unused(self) -> None:
        """See `Device.give_back_unused`."""
        torch.cuda.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `Device.is_out_of_memory`."""
        if isinstance(error, torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
