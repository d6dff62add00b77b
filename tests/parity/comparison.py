"""Compares two checkpoints tensor by tensor, and knows how far they may be apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

TABLE = Path(__file__).with_name("TOLERANCES.md")
_ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` → `(\w+)` \| ([\d.]+) \| ([\d.]+) %? ?\|", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart two results of one method may be.

    Attributes:
        units: largest difference of any element, in units as `difference_units` defines them.
        percent: how many percent of a checkpoint's elements may differ at all.
    """

    units: float
    percent: float


@dataclass(frozen=True, slots=True)
class Numbers:
    """The dtypes of a merge: ``dtype`` and ``out_dtype`` of the recipe."""

    dtype: str
    out_dtype: str

    @property
    def yaml(self) -> str:
        """The recipe's lines."""
        return f"dtype: {self.dtype}\nout_dtype: {self.out_dtype}\n"

    def __str__(self) -> str:
        return f"{self.dtype}-{self.out_dtype}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far apart two checkpoints are.

    Attributes:
        units: largest difference of any element in units as `difference_units` defines them.
        percent: percentage of elements that differ at all.
        tensor: where the largest difference is.
    """

    units: float
    percent: float
    tensor: str


def read_tolerances() -> dict[tuple[str, Numbers], Tolerance]:
    """The published table: tolerance by method and dtypes."""
    return {
        (method, Numbers(dtype, out_dtype)): Tolerance(float(units), float(percent))
        for method, dtype, out_dtype, units, percent in _ROW.findall(TABLE.read_text())
    }


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by the safetensors library rather than by our own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def spacing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance from each element of a float64 tensor to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent)


def difference_units(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Difference of each element, in units in the last place.

    One unit is the spacing of the stored dtype at the element, but no less than the spacing of float32 at the tensor's
    largest element: a sum that cancels to almost nothing carries the rounding of its terms, in whatever order.
    """
    a, b = ours.double(), theirs.double()
    largest = torch.maximum(a.abs().max(), b.abs().max())
    unit = torch.maximum(
        spacing(torch.maximum(a.abs(), b.abs()), ours.dtype), spacing(largest.reshape(1), torch.float32)
    )
    return (a - b).abs() / unit


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> Difference:
    """How far apart checkpoints with the same names, shapes and dtypes are."""
    worst, worst_name, num_differing, num_elements = 0.0, "", 0, 0
    for name, expected in theirs.items():
        units = difference_units(ours[name], expected)
        num_differing += int((units > 0).sum())
        num_elements += units.numel()
        if float(units.max()) > worst:
            worst, worst_name = float(units.max()), name
    return Difference(worst, 100.0 * num_differing / num_elements, worst_name)
