"""Where merges are computed: on the CPU, or on a device that is fed through copies of its own.

A device is described by `Device`: three lanes (streams, as CUDA calls them) on which work is done in the order it was
handed over, while this process goes on; marks that one lane, or a thread, waits for another with; host memory that it
copies from and to by itself; and what is free. All that is known of CUDA is in `runtime/device_cuda.py`; what moves
windows over the lanes is in `runtime/device_copies.py` and `runtime/device_evaluate.py`. torch is not imported here.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol, Self

from mergekit_ray.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"

_NAME: Final = re.compile(r"auto|cpu|cuda(:\d+)?")

_GPU_DRIVERS: Final = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")
"""Through which a process talks to GPUs: NVIDIA's (of two kinds), AMD's (CUDA to torch, too), those of Windows."""

_CHOSEN: ContextVar[str] = ContextVar("device", default=CPU)


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


def check_device(name: str) -> str:
    """The name of a device, if it is one: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no device", remedy="write auto, cpu, cuda, or cuda:0, cuda:1 and so on")
    return name


@contextlib.contextmanager
def computing_on(name: str) -> Iterator[None]:
    """Workers that are set up meanwhile compute on this device. See `check_device` for names and errors."""
    token = _CHOSEN.set(check_device(name))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_device() -> str:
    """The name that `computing_on` was given; the CPU without one."""
    return _CHOSEN.get()


def resolve(name: str, worker: int = 0) -> str:
    """The device that a name means in this process: ``cpu`` or ``cuda:N``.

    Args:
        name: see `check_device`. ``auto`` is a CUDA device where there is one.
        worker: number of the worker; those of one process take its devices in turn.

    Raises:
        ConfigError: a CUDA device is asked for that is not there.
    """
    if check_device(name) == CPU or (name == AUTO and not _may_have_gpu()):
        return CPU
    import torch  # noqa: PLC0415 - names are checked without torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO and not count:
        return CPU
    number = int(name.partition(":")[2] or worker % max(1, count))
    if number >= count:
        found = f"there are {count} CUDA devices" if count else _why_none()
        raise ConfigError(f"--device {name}: {found}", remedy="pass --device auto or --device cpu")
    return f"{CUDA}:{number}"


def _may_have_gpu() -> bool:
    """Whether this machine may have a GPU that torch can use; to import torch costs a second."""
    return sys.platform != "linux" or any(map(os.path.exists, _GPU_DRIVERS))


def _why_none() -> str:
    import torch  # noqa: PLC0415

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no CUDA device (see nvidia-smi, and CUDA_VISIBLE_DEVICES)"


def open_device(name: str) -> Device:
    """A device by its resolved name, which is not the CPU's."""
    from mergekit_ray.runtime.device_cuda import CudaDevice  # noqa: PLC0415 - only where there is one

    return CudaDevice(name)
