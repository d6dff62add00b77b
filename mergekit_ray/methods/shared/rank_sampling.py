"""Magnitude sampling: random masks that keep large elements with a higher probability.

In each row (last dimension; a vector is one row) of ``n`` elements, ranks run from 0 for the smallest magnitude to
``n − 1``; of equal magnitudes the lower index is the larger, as in `methods.shared.selection`. Rank ``r`` is kept
with probability ``density − ε + 2 ε r / (n − 1)``; the element of a row of one with probability ``density``. The random
words are those of `mergekit_ray.methods.shared.random_mask`: with ε = 0 this is its mask.
Deep et al. 2024, "DELLA-Merging", https://arxiv.org/abs/2406.11617 (MAGPRUNE).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from mergekit_ray.core.errors import MergeError
from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.order_statistics import patterns_
from mergekit_ray.methods.shared.packed_mask import ALIGNMENT, pack
from mergekit_ray.methods.shared.packed_mask import trim_ as trim_flagged_
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS
from mergekit_ray.methods.shared.random_mask import hash_words
from mergekit_ray.methods.shared.scratch import Scratch
from mergekit_ray.methods.shared.sums import partial_sums

if TYPE_CHECKING:
    import torch

_MANTISSA_BITS = {4: 23, 8: 52}
"""By bytes of the dtype."""


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of a row of a tensor of this shape."""
    return shape[-1] if shape else 1


def run_elements(length: int, block_elements: int = BLOCK_ELEMENTS) -> int:
    """Elements of whole rows that are about a block and make whole bytes of a mask.

    A row longer than a block is seen at one go nevertheless: memory grows with it.
    """
    least = ALIGNMENT // gcd(ALIGNMENT, length) if length else 1
    return max(block_elements // max(length, 1) // least, 1) * least * max(length, 1)


def check_probabilities(density: float, epsilon: float) -> None:
    """Refuse probabilities ``density ± epsilon`` that are none.

    Raises:
        MergeError: they are not within (0, 1), though the density is.
    """
    if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
        raise MergeError(
            f"density {density:g} ± epsilon {epsilon:g} is not within (0, 1)",
            remedy="set a smaller `epsilon`, or a `density` further from 0 and 1 (0 and 1 themselves need none)",
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """What became of a run.

    Attributes:
        mask: a bit per element.
        whole, kept: partial L1 sums before and after: float64, on the device of the values.
    """

    mask: torch.Tensor
    whole: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True, slots=True)
class MagnitudeSampling:
    """A random mask of rows whose probabilities rise with the rank.

    Attributes:
        key: seeds it; different keys give independent masks.
        density: mean probability of being kept; 1 or more keeps all, 0 or less none.
        epsilon: how far the probabilities are from it at most; not negative.

    Raises:
        MergeError: ``density ± epsilon`` is not within (0, 1), though the density is.
    """

    key: str
    density: float
    epsilon: float

    def __post_init__(self) -> None:
        check_probabilities(self.density, self.epsilon)

    @property
    def is_random(self) -> bool:
        """Whether some elements are dropped and some kept."""
        return 0.0 < self.density < 1.0

    def sample(self, values: torch.Tensor, start: int, length: int, scratch: Scratch) -> Sampled:
        """The mask of whole rows, which must be a random one, and what it keeps.

        Args:
            values: 1-D run of rows; overwritten.
            start: flat index of its first element.
            length: of a row.
            scratch: working memory.
        """
        import torch  # noqa: PLC0415 - declarations are read without torch

        words = hash_words(self.key, start, scratch.like(values, torch.int32), scratch.like(values, torch.int32))
        if not is_compiled_for(values):
            return self.sampled_by_torch(values, words, length, scratch)
        from mergekit_ray.methods.compiled import ranks  # noqa: PLC0415 - compilers load where they are needed

        magnitudes = values.abs_()
        kept = scratch.like(values, torch.uint8)
        low, step = self.probabilities(length)
        patterns = patterns_(values).numpy()
        ranks.keep_rows(patterns, words.numpy(), kept.numpy(), length, low, step, _MANTISSA_BITS[values.itemsize])
        sums = torch.tensor(ranks.kept_norms(magnitudes.numpy(), kept.numpy()), dtype=torch.float64)
        return Sampled(pack(kept), sums[:1], sums[1:])

    def sampled_by_torch(self, values: torch.Tensor, words: torch.Tensor, length: int, scratch: Scratch) -> Sampled:
        """On any device and in any dtype."""
        import torch  # noqa: PLC0415

        magnitudes = values.abs_()
        kept = self.keep_by_torch(magnitudes, words, length)
        wide = scratch.like(values, torch.float64)
        whole = partial_sums(wide.copy_(magnitudes), wide)
        trim_flagged_(magnitudes, kept)
        return Sampled(pack(kept), whole, partial_sums(wide.copy_(magnitudes), wide))

    def keep_by_torch(self, magnitudes: torch.Tensor, words: torch.Tensor, length: int) -> torch.Tensor:
        """1 where an element of whole rows is kept, 0 elsewhere: uint8. By a stable sort of every row."""
        import torch  # noqa: PLC0415

        descending = magnitudes.view(-1, length).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(length - 1, -1, -1, device=magnitudes.device).expand_as(descending)
        ranks = torch.empty_like(descending).scatter_(1, descending, places)
        low, step = self.probabilities(length)
        limits = ranks.to(torch.float64).mul_(step).add_(low).mul_(1 << 32).floor_().to(torch.int64).sub_(1 << 31)
        return (words.view(-1, length) < limits).to(torch.uint8).view(-1)

    def probabilities(self, length: int) -> tuple[float, float]:
        """That of the smallest magnitude of a row, and what each rank adds."""
        if length == 1:
            return self.density, 0.0
        return self.density - self.epsilon, 2.0 * self.epsilon / (length - 1)
