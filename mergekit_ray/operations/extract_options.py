"""What `extract_lora` is asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergekit_ray.core.arguments import check_fields, is_number, is_whole
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, PlanError
from mergekit_ray.planning.extraction import Coverage


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What is extracted.

    Attributes:
        rank: of every matrix; None if ``energy`` is given.
        energy: share of each difference's squared norm that its factors must hold, above 0 and at most 1; the least
            rank that does is taken.
        coverage: which tensors.
        dtype: that factors are stored in; text such as ``bfloat16`` is taken, too.
    """

    rank: int | None = None
    energy: float | None = None
    coverage: Coverage = field(default_factory=Coverage)
    dtype: DType = DType.F32

    if TYPE_CHECKING:

        def __init__(
            self,
            rank: int | None = ...,
            energy: float | None = ...,
            coverage: Coverage = ...,
            dtype: DType | str = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value that none of them can have.
            PlanError: neither or both of rank and energy, or out of range.
        """
        checks = {
            "rank": (self.rank is None or is_whole(self.rank, -sys.maxsize), "None or a whole number"),
            "energy": (self.energy is None or is_number(self.energy), "None or a number"),
            "coverage": (isinstance(self.coverage, Coverage), "a Coverage"),
            "dtype": (isinstance(self.dtype, DType | str), "a DType or its name, such as 'bfloat16'"),
        }
        check_fields(self, checks)
        try:
            named = str(getattr(self.dtype, "config_name", self.dtype))
            object.__setattr__(self, "dtype", DType.parse(named))
        except ValueError as error:
            raise ConfigError(str(error), where="ExtractOptions", remedy="give another `dtype=`") from None
        if (self.rank is None) == (self.energy is None):
            raise PlanError("give either a rank or an energy", remedy="`rank=16`, or `energy=0.9`")
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"a rank must be at least 1, not {self.rank}", remedy="`rank=16`")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise PlanError(f"an energy must be above 0 and at most 1, not {self.energy}", remedy="`energy=0.9`")
