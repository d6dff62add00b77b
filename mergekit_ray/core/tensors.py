"""What is known of a tensor without reading it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mergekit_ray.core.dtypes import DType

_WILDCARDS = re.compile(r"[*?\[]")


def matches(pattern: str, name: str) -> bool:
    """Whether a filter means a tensor: by a part of its name or, with ``*``, ``?`` or ``[...]``, by all of it."""
    return fnmatchcase(name, pattern) if _WILDCARDS.search(pattern) else pattern in name


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
