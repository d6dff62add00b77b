"""What is known of a tensor without reading it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_ray.core.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of a tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor's bytes are: a file of its checkpoint and a byte range of that file, end exclusive."""

    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.end - self.start
