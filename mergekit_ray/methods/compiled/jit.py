"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Decorator: compiled by numba at its first call, once per kind of arguments.

    The machine code is kept on disk (beside this package, or in the user's cache folder), so that only the first run of
    an installation compiles. Compiled loops do not hold the interpreter's lock. Arithmetic is IEEE's, operation by
    operation: nothing is reordered or fused, so results are those of the same operations in torch.
    """
    try:
        return cast(F, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # neither folder can be written to: compile in each process
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))
