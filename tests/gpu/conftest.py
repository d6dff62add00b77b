"""A CUDA device, or a reason that is printed why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.evaluation.device.cuda import CudaDevice
from mergekit_ray.evaluation.device.names import CUDA, resolve

REQUIRED = "MERGEKIT_RAY_REQUIRE_GPU"
"""Set where there should be a device (`make gpu`): then it is an error that there is none."""


@pytest.fixture(scope="session")
def device_name() -> str:
    try:
        return resolve(CUDA)
    except ConfigError as error:
        if os.environ.get(REQUIRED):
            raise
        pytest.skip(f"GPU TESTS NOT RUN: {error.what}. `make gpu` runs them where there is a CUDA device.")


@pytest.fixture
def device(device_name: str) -> Iterator[CudaDevice]:
    """The device, whose memory is all given back afterwards."""
    torch.cuda.empty_cache()
    yield CudaDevice(device_name)
    torch.cuda.set_per_process_memory_fraction(1.0, torch.device(device_name))
    torch.cuda.empty_cache()
