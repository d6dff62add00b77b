"""A matrix in memory, as compiled loops and torch see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix in memory, as loops and torch see it.

    Attributes:
        data: ``[rows, elements]``, contiguous, bfloat16 or float32.
    """

    data: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Rows:
        """Of a matrix of any floating dtype: the matrix itself if it is stored so, else as float32."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        is_fit = x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and x.data_ptr() % x.itemsize == 0
        return cls(x if is_fit else x.to(torch.float32).contiguous().clone())

    @property
    def place(self) -> tuple[int, int, int]:
        """As compiled loops take it: the address, the bytes of an element, the elements of a row."""
        return self.data.data_ptr(), self.data.itemsize, self.num_elements

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.data.shape[0]

    @property
    def num_elements(self) -> int:
        """Elements of a row."""
        return self.data.shape[1]

    def doubles(self, first: int, last: int) -> torch.Tensor:
        """Rows ``[first, last)`` in float64."""
        return self.data[first:last].double()
