"""What a `SumMethod` makes of a run of elements, as data: for each kind there is a compiled loop. All is float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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


@dataclass(frozen=True, slots=True)
class Interpolation:
    """``a + t (b - a)`` of two vectors."""

    t: float


@dataclass(frozen=True, slots=True)
class Clamped:
    """The second of two vectors, clamped to within ``t`` of the first, element by element."""

    t: float


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
