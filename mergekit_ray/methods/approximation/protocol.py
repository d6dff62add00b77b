"""What an approximation is given, and what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from mergekit_ray.core.approximation import APPROXIMATIONS, ApproximationDeclaration
from mergekit_ray.methods.shared.stored_rows import Rows

if TYPE_CHECKING:
    import numpy as np
    import torch

    Draw: TypeAlias = Callable[[int, int], np.ndarray[Any, np.dtype[np.float64]]]


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows of the tokens that both models have, in one order; None where the method does not use them.

    Attributes:
        model: ``[n, d]``. For a method that does not use the donor, any rows of the model.
        donor: ``[n, e]``.
    """

    model: Rows | None = None
    donor: Rows | None = None


class Approximation(ApproximationDeclaration, ABC):
    """One way to make rows for missing tokens.

    A row is a function of the shared rows, of the donor's row, and of its own index: the same however the rows are cut,
    on any number of threads.

    Args:
        parameters: an instance of its declared parameters.
        draw: standard normal numbers ``[start, start + count)`` of an endless series that is the approximation's own.
    """

    batch_rows: ClassVar[int] = 64
    """Rows that are best computed together."""

    def __init__(self, parameters: Any, draw: Draw) -> None:
        self.chosen = parameters
        self.draw = draw

    def fit(self, shared: Shared) -> Any:
        """What all rows have in common: computed once, handed to `approximate`."""
        return shared

    @abstractmethod
    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """Rows of missing tokens.

        Args:
            fitted: from `fit`.
            missing: the donor's rows of these tokens, ``[rows, e]`` in float32; None if it does not use the donor.
            start: index of the first row among all missing ones.
            out: the model's rows, ``[rows, d]`` in float32. NaN wherever something that counts is not finite.
        """


def approximation(name: str, parameters: Mapping[str, Any], draw: Draw) -> Approximation:
    """The approximation of a name, with its parameters. See `Approximation`.

    Raises:
        ConfigError: there is none of that name.
        ValidationError: the parameters are not its own, or out of range.
    """
    found = APPROXIMATIONS.get(name)
    assert issubclass(found, Approximation)
    return found(found.parameters.model_validate(dict(parameters)), draw)
