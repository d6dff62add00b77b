"""Orthogonal matching pursuit over the rows of a matrix, for a batch of targets at once.

    repeat k times:  j = argmax |a_j · r|;  c = the least squares solution of Σ c_i a_i ≈ x;  r = x − Σ c_i a_i

Nearly all of the work are the products of the residuals with all atoms: multiplications of matrices, in bfloat16 where
the processor is faster at it, else in float32. Their error is bounded, whatever the order in which a library adds
(Higham 2002, "Accuracy and Stability of Numerical Algorithms", 3.1). Atoms that may be the best within it are compared
in float64, in one order. So the choice depends neither on the processor nor on which targets make a batch.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from mergekit_ray.methods.compiled import pursuit as loops
from mergekit_ray.methods.compiled.pursuit import Candidates, Flags, Integers, Solutions
from mergekit_ray.methods.compiled.runs import Doubles
from mergekit_ray.methods.shared.stored_rows import Rows

_CANDIDATES: Final = 256
"""Atoms of a row that are compared in float64; if more may be the best, all are."""

_UNIT: Final = 2.0**-24
"""Relative error of one operation in float32."""

_HALF_UNIT: Final = 2.0**-8
"""Relative error of rounding to bfloat16."""


@dataclass(frozen=True, slots=True)
class Combinations:
    """Sparse sums of rows, one for each target.

    Attributes:
        picked: which rows, ``[targets, k]``.
        coefficients: of each.
        sizes: how many of them count for each target.
        is_finite: False for a target for which there is none.
    """

    picked: Integers
    coefficients: Doubles
    sizes: Integers
    is_finite: Flags


def squared_norms(rows: Rows) -> Doubles:
    """Of each row, in float64."""
    found = np.empty(rows.num_rows)
    loops.squares(rows.place, found)
    return found


@dataclass(frozen=True, slots=True)
class Screen:
    """Products of residuals with atoms, roughly.

    Attributes:
        dtype: that is multiplied in.
        error: bound on the error of a product, as a share of the product of the norms.
        share: and in addition, as a share of the product itself.
    """

    dtype: torch.dtype
    error: float
    share: float

    @classmethod
    def of(cls, atoms: Rows, dtype: torch.dtype) -> Screen:
        """In float32 or bfloat16. Sums are float32 in both; in bfloat16 factors and the result are rounded, too."""
        summing = (atoms.num_elements + 2) * _UNIT
        summing /= 1 - summing
        if dtype is torch.float32:
            return cls(dtype, summing, 0.0)
        factors = 1 if atoms.data.dtype is dtype else 2
        return cls(dtype, 1.01 * (factors * _HALF_UNIT + summing), 1.01 * _HALF_UNIT)

    def products(self, residuals: torch.Tensor, atoms: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """``[targets, atoms]`` in float32, in ``room``."""
        found = room[: residuals.shape[0] * atoms.shape[0]].view(residuals.shape[0], atoms.shape[0])
        if self.dtype is torch.float32:
            return torch.mm(residuals, atoms.float().t(), out=found)
        return found.copy_(torch.mm(residuals, atoms.to(self.dtype).t()))


@functools.cache
def fastest_dtype() -> torch.dtype:
    """What this processor multiplies matrices fastest in. It decides nothing but the time."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(128, 512, dtype=dtype)
        y = torch.ones(512, 512, dtype=dtype)
        torch.mm(x, y)
        began = time.perf_counter()
        for _ in range(3):
            torch.mm(x, y)
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=seconds.__getitem__)


def pursuit(
    atoms: Rows,
    longest: float,
    targets: torch.Tensor,
    k: int,
    *,
    atoms_at_once: int = 1024,
    dtype: torch.dtype | None = None,
) -> Combinations:
    """Approximate each target by ``k`` atoms, or fewer if nothing is left.

    Args:
        atoms: ``[n, e]``.
        longest: the largest norm of an atom; if it is not finite, nothing is approximated.
        targets: ``[m, e]``, float32 and contiguous.
        k: atoms of a target.
        atoms_at_once: that targets are multiplied with at a time.
        dtype: float32 or bfloat16, to choose candidates in; None for what is fastest. It does not change the result.
    """
    x = targets.numpy()
    m, k = x.shape[0], min(k, atoms.num_rows)
    residuals = targets.clone()
    is_finite = np.isfinite(x).all(axis=1) & np.isfinite(longest)
    solutions = Solutions(
        factors=np.zeros((m, k, k)),
        right=np.zeros((m, k)),
        picked=np.zeros((m, k), np.int64),
        coefficients=np.zeros((m, k)),
        sizes=np.zeros(m, np.int64),
        active=is_finite & (x != 0).any(axis=1),
    )
    candidates = Candidates(
        errors=np.zeros(m),
        largest=np.zeros(m),
        counts=np.zeros(m, np.int64),
        indices=np.zeros((m, _CANDIDATES), np.int64),
        magnitudes=np.zeros((m, _CANDIDATES)),
    )
    room = torch.empty(m * atoms_at_once)
    screen = Screen.of(atoms, dtype or fastest_dtype())
    for _ in range(k):
        if not solutions.active.any():
            break
        candidates.errors[:] = screen.error * longest * residuals.double().norm(dim=1).numpy()
        candidates.largest[:] = 0.0
        candidates.counts[:] = 0
        rounded = residuals.to(screen.dtype)
        for first in range(0, atoms.num_rows, atoms_at_once):
            found = screen.products(rounded, atoms.data[first : first + atoms_at_once], room)
            loops.scan(found.numpy(), first, screen.share, candidates)
        chosen = loops.choose(atoms.place, atoms.num_rows, residuals.numpy(), screen.share, candidates)
        loops.extend(atoms.place, x, residuals.numpy(), chosen, solutions)
    return Combinations(solutions.picked, solutions.coefficients, solutions.sizes, is_finite)


def combined(found: Combinations, rows: Rows, out: torch.Tensor) -> None:
    """The same combinations of the rows of another matrix, ``[targets, d]`` in float32; NaN where there is none."""
    loops.combine(rows.place, found.picked, found.coefficients, found.sizes, out.numpy())
    out[~torch.from_numpy(found.is_finite)] = torch.nan
