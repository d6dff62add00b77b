"""Devices by name: which there are, and which one a name means in this process. torch is imported where it is asked."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Final

from mergekit_ray.core.errors import ConfigError

if TYPE_CHECKING:
    from mergekit_ray.evaluation.device.protocol import Device

AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"

_NAME: Final = re.compile(r"auto|cpu|cuda(:\d+)?")

_GPU_DRIVERS: Final = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")
"""Through which a process talks to GPUs: NVIDIA's (of two kinds), AMD's (CUDA to torch, too), those of Windows."""


def check_device(name: str) -> str:
    """The name of a device, if it is one: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a device", remedy="write auto, cpu, cuda, or cuda:0, cuda:1 and so on")
    return name


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
        raise ConfigError(f"device {name!r}: {found}", remedy="pass `device='auto'` or `device='cpu'`")
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
    from mergekit_ray.evaluation.device.cuda import CudaDevice  # noqa: PLC0415 - only where there is one

    return CudaDevice(name)
