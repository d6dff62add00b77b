"""Compares two checkpoints tensor by tensor, and knows how far they may be apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

TABLE = Path(__file__).with_name("TOLERANCES.md")
_ROW = re.compile(
    r"^\| `(\w+)` \| `(\w+)` → `(\w+)` \| ([\d.]+) \| ([\d.]+)(?: %)? \| ([\d.]+)(?: %)? \|", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart two results of one method may be.

    Attributes:
        units: how far apart elements may be, in units as `difference_units` defines them.
        beyond_percent: how many percent of a checkpoint's elements may be further apart nevertheless.
        differing_percent: how many percent of a checkpoint's elements may differ at all.
    """

    units: float
    beyond_percent: float
    differing_percent: float


@dataclass(frozen=True, slots=True)
class Numbers:
    """The dtypes of a merge: ``dtype`` and ``out_dtype`` of the recipe."""

    dtype: str
    out_dtype: str

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that mergekit calculates in; ours is float32 always."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

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
        largest: largest difference of any element in units as `difference_units` defines them.
        tensor: where it is.
        beyond_percent: percentage of elements that differ by more than is tolerated.
        differing_percent: percentage of elements that differ at all.
    """

    largest: float
    tensor: str
    beyond_percent: float
    differing_percent: float


def read_tolerances() -> dict[tuple[str, Numbers], Tolerance]:
    """The published table: tolerance by method and dtypes."""
    return {
        (method, Numbers(dtype, out_dtype)): Tolerance(*map(float, figures))
        for method, dtype, out_dtype, *figures in _ROW.findall(TABLE.read_text())
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


def difference_units(ours: torch.Tensor, theirs: torch.Tensor, arithmetic: torch.dtype) -> torch.Tensor:
    """Difference of each element, in units in the last place.

    One unit is the spacing of the stored dtype at the element, but not less than that of the arithmetic's dtype at the
    tensor's largest element: a sum that cancels to almost nothing carries the rounding of its terms.
    """
    a, b = ours.double(), theirs.double()
    magnitude = torch.maximum(a.abs(), b.abs())
    unit = torch.maximum(spacing(magnitude, ours.dtype), spacing(magnitude.max().reshape(1), arithmetic))
    return (a - b).abs() / unit


def compare(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], arithmetic: torch.dtype, tolerated_units: float
) -> Difference:
    """How far apart checkpoints with the same names, shapes and dtypes are."""
    largest, largest_name, num_beyond, num_differing, num_elements = 0.0, "", 0, 0, 0
    for name, expected in theirs.items():
        units = difference_units(ours[name], expected, arithmetic)
        num_beyond += int((units > tolerated_units).sum())
        num_differing += int((units > 0).sum())
        num_elements += units.numel()
        if float(units.max()) > largest:
            largest, largest_name = float(units.max()), name
    return Difference(largest, largest_name, 100.0 * num_beyond / num_elements, 100.0 * num_differing / num_elements)
