"""What a `SumMethod` makes of a run of elements. All is float32.

Sums of tensors as they are stored are formulas, of which loops are made (see `methods.compiled.formula_loops`). What
masks keep has a loop of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mergekit_ray.methods.shared.numbers import Number, fma, maximum, minimum

if TYPE_CHECKING:
    from mergekit_ray.methods.shared.random_mask import RandomMask


@dataclass(frozen=True, slots=True)
class Sum:
    """``scale · (Σ factor_i v_i) / divisor``, all steps in float32; where it is of changes, the base is added.

    Attributes:
        factors: one for each vector: the models, the base first if it is one of them (``base_is_input``); or, where the
            method has a base beside them, the changes ``x_i - base``.
        divisor: 1 to leave it out.
        scale: 1 to leave it out.
        rounds_products: before they are added; otherwise products are added fused.
    """

    factors: Sequence[float]
    divisor: float = 1.0
    scale: float = 1.0
    rounds_products: bool = False

    def formula(self, vectors: Sequence[Number], base: Number | None) -> Number:
        """The sum of one element of each vector, or of their changes from the base."""
        first, *others = vectors if base is None else [x - base for x in vectors]
        total = first * self.factors[0]
        for term, factor in zip(others, self.factors[1:], strict=True):
            total = total + term * factor if self.rounds_products else fma(term, factor, total)
        if self.divisor != 1.0:
            total = total / self.divisor
        if self.scale != 1.0:
            total = total * self.scale
        return total if base is None else base + total


@dataclass(frozen=True, slots=True)
class Interpolation:
    """``a + t (b - a)`` of two vectors."""

    t: float

    def formula(self, vectors: Sequence[Number], base: Number | None) -> Number:
        """From the nearer end, as ``torch.lerp`` has it."""
        import numpy as np  # noqa: PLC0415 - declarations are read without numpy

        del base
        a, b = vectors
        t = np.float32(self.t)
        if abs(t) < np.float32(0.5):
            return fma(b - a, float(t), a)
        return fma(b - a, float(t - np.float32(1.0)), b)


@dataclass(frozen=True, slots=True)
class Clamped:
    """The second of two vectors, clamped to within ``t`` of the first, element by element."""

    t: float

    def formula(self, vectors: Sequence[Number], base: Number | None) -> Number:
        """Where both are zero, the bound."""
        del base
        a, b = vectors
        return minimum(maximum(b, a - self.t), a + self.t)


@dataclass(frozen=True, slots=True)
class Elected:
    """What sign election makes of changes (see `mergekit_ray.methods.shared.sign`), added to the base.

    Attributes:
        factors: of each change.
        weights: of each input, for the divisor.
        scale: λ.
        normalize: divide by the weights of those that agree.
    """

    factors: Sequence[float]
    weights: Sequence[float]
    scale: float
    normalize: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """What is made of changes after a mask has dropped some of each.

    Attributes:
        masks: of each input.
        how: the rest is combined.
    """

    masks: Sequence[RandomMask]
    how: Sum | Elected


Combination: TypeAlias = Sum | Interpolation | Clamped | Kept
