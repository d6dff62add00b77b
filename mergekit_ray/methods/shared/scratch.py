"""Working memory of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Scratch(Protocol):
    """Reused working memory of one thread. What it gives is valid until the current call of the method returns."""

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor of the shape of ``x`` on its device, in ``dtype`` or that of ``x``."""
        ...
