"""What a device is, beside the CPU.

It has three lanes (streams, as CUDA calls them), on which work is done in the order it was handed over while this
process goes on; marks that one lane, or a thread, waits for another with; host memory that it copies from and to by
itself; and memory of its own. All that is known of CUDA is in `evaluation.device.cuda`; tests have a simulated device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch


class Mark(Protocol):
    """A place in a lane's work."""

    def wait(self) -> None:
        """Block this thread until the lane has come there."""
        ...


class Lane(Protocol):
    """Work that a device does in order, beside that of its other lanes."""

    def __enter__(self) -> Self:
        """What this thread hands to the device goes to this lane until the end of the ``with``."""
        ...

    def __exit__(self, *args: object) -> None:
        """Back to the lane before."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between the device and host memory that it gave; nobody waits.

        Both are 1-D, of one dtype and length.
        """
        ...

    def mark(self) -> Mark:
        """After all that was handed to this lane so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Whatever is handed to this lane from now on waits for a mark of another."""
        ...


class Device(Protocol):
    """A device beside the CPU.

    Attributes:
        name: for people.
        torch_device: torch's name for it.
        uploads, compute, downloads: its lanes.
    """

    name: str
    torch_device: torch.device

    @property
    def uploads(self) -> Lane: ...  # noqa: D102 - see the class

    @property
    def compute(self) -> Lane: ...  # noqa: D102 - see the class

    @property
    def downloads(self) -> Lane: ...  # noqa: D102 - see the class

    def free_bytes(self) -> int:
        """Memory that may still be asked for."""
        ...

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised uint8 host memory that it copies from and to by itself (pinned)."""
        ...

    def lend(self, tensor: torch.Tensor, lane: Lane) -> None:
        """A tensor made on another lane is used on this one: its memory is not given to others before that is done."""
        ...

    def give_back_unused(self) -> None:
        """Return memory that is kept for reuse."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the device's memory did not suffice."""
        ...
