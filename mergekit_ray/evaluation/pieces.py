"""The bytes of a window's inputs and of its result, as all ways to compute it take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from mergekit_ray.core.expressions import Stored

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

Pieces: TypeAlias = Mapping[Stored, tuple[Bytes, int]]
"""Of each leaf that is read the bytes of a window, and the flat index of its first element."""

Filling: TypeAlias = Callable[[int, Bytes], bool]
"""Writes the elements that begin with a flat index, as many as there is room for; says whether all of them are finite.
If not, what has been written is not the result."""
