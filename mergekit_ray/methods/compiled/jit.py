"""How the loops are compiled."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Decorator: compiled by numba at its first call, once per kind of arguments.

    The machine code is kept on disk (beside this package, or in the user's cache folder), so that only the first run of
    an installation compiles. Compiled loops do not hold the interpreter's lock. Arithmetic is IEEE's, operation by
    operation: nothing is reordered or fused, so results are those of the same operations in torch.
    """
    # numba looks at one file to see whether code is still good, and names what it keeps after the function: so the name
    # says what all the files were, since loops are made of parts of each other's.
    name = function.__qualname__
    function.__qualname__ = f"{name}-{sources_digest(Path(__file__).parent)}"
    try:
        return cast(F, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # neither folder can be written to: compile in each process
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))
    finally:
        function.__qualname__ = name


@functools.cache
def sources_digest(folder: Path) -> str:
    """Of all Python files in a folder, their names and what is in them."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
