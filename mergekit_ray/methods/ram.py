"""RAM: changes of one model as they are, changes of several averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared.protocol import Chunk, ElementwiseMethod, Operands, ReduceMethod
from mergekit_ray.methods.shared.task_vectors import task_vectors

if TYPE_CHECKING:
    import torch


class RamParameters(Parameters):
    """Global parameters of `Ram`."""

    epsilon: float = Field(1e-5, description="changes of up to this size are none", ge=0.0, allow_inf_nan=False)


class RamPlusParameters(RamParameters):
    """Global parameters of `RamPlus`."""

    r: float = Field(0.1, description="how much a change of one model grows with its shared part", allow_inf_nan=False)
    alpha: float = Field(0.2, description="limit of the ratio of shared to unique changes", ge=0.0, allow_inf_nan=False)


@METHODS.register("ram")
class Ram(ElementwiseMethod):
    """Reinforced Agent Merging: an element is changed by the models whose ``|δ_i|`` there is above ``epsilon``.

    Changed by one model: its δ; by several: the mean of theirs; by none: the base stays. arXiv 2601.13572.
    """

    name = "ram"
    summary = "Keep what one model alone changes, average what several do."
    formula = "b + Σ c_i·δ_i / Σ c_i, b where Σ c_i = 0; c_i = [|δ_i| > epsilon]"
    reference = "https://arxiv.org/abs/2601.13572"
    base = BaseUse.REQUIRED
    global_parameters = RamParameters

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        del statistics
        return merge_(chunk, operands.parameters.epsilon, [1.0] * operands.num_inputs)


@METHODS.register("ramplus_tl")
class RamPlus(ReduceMethod):
    """As `Ram`, the changes of one model alone times ``1 + r·clip(ρ_i, 0, alpha)``.

    ``ρ_i`` is the number of elements that model ``i`` changes together with others over the number it changes alone, in
    this tensor. A model that changes nothing alone has no use for one. arXiv 2601.13572, on the level of tensors.
    """

    name = "ramplus_tl"
    summary = "Keep and reinforce what one model alone changes, average what several do."
    formula = (
        "b + (1 + r·clip(ρ_i, 0, alpha))·δ_i where model i alone changes it, mean of δ where several do; ρ_i = shared"
        " count / unique count"
    )
    reference = "https://arxiv.org/abs/2601.13572"
    base = BaseUse.REQUIRED
    global_parameters = RamPlusParameters

    def statistics(self, operands: Operands) -> list[float]:
        """The factor of each model's own changes."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        settings = operands.parameters
        blocks = operands.map_blocks(lambda chunk: count_changes(chunk, settings.epsilon))
        if not blocks:
            return [1.0] * operands.num_inputs
        factors = []
        for changed, alone in torch.stack(blocks).sum(dim=0).t().tolist():
            ratio = (changed - alone) / alone if alone else 0.0
            factors.append(1.0 + settings.r * min(ratio, settings.alpha))
        return factors

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the factors."""
        return merge_(chunk, operands.parameters.epsilon, statistics)


def count_changes(chunk: Chunk, epsilon: float) -> torch.Tensor:
    """How many elements each model changes, and how many it alone changes: int64 ``[2, num_models]``."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    assert chunk.base is not None  # held by the declarations: base REQUIRED
    if not is_compiled_for(chunk.base):
        return count_changes_by_torch(chunk, epsilon)
    from mergekit_ray.methods.compiled import ram  # noqa: PLC0415 - compilers load where they are needed

    run = chunk.base.numpy()
    return torch.from_numpy(ram.count_changes(run, tuple(x.numpy() for x in chunk.inputs), run.dtype.type(epsilon)))


def count_changes_by_torch(chunk: Chunk, epsilon: float) -> torch.Tensor:
    """`count_changes` by torch's operations."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    _, deltas = task_vectors(chunk)
    changes = torch.stack([delta.abs_() > epsilon for delta in deltas])
    return torch.stack([changes.sum(dim=1), (changes & (changes.sum(dim=0) == 1)).sum(dim=1)])


def merge_(chunk: Chunk, epsilon: float, gains: Sequence[float]) -> torch.Tensor:
    """The merged run, in place of the base; ``gains`` are the factors of what one model alone changes."""
    assert chunk.base is not None
    if not is_compiled_for(chunk.base):
        return merge_by_torch_(chunk, epsilon, gains)
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    from mergekit_ray.methods.compiled import ram  # noqa: PLC0415 - compilers load where they are needed

    run = chunk.base.numpy()
    ram.merge(run, tuple(x.numpy() for x in chunk.inputs), run.dtype.type(epsilon), np.array(gains, dtype=run.dtype))
    return chunk.base


def merge_by_torch_(chunk: Chunk, epsilon: float, gains: Sequence[float]) -> torch.Tensor:
    """`merge_` by torch's operations, the same ones in the same order."""
    base, deltas = task_vectors(chunk)
    sums, numbers, gain_sums = (chunk.scratch.like(base).zero_() for _ in range(3))
    for delta, gain in zip(deltas, gains, strict=True):
        is_changed = delta.abs() > epsilon
        sums.add_(delta.masked_fill_(~is_changed, 0.0))
        numbers.add_(is_changed)
        gain_sums.add_(is_changed.to(base.dtype).mul_(gain))
    sums.mul_(gain_sums.masked_fill_(numbers != 1, 1.0)).div_(numbers)
    return base.add_(sums.masked_fill_(numbers == 0, -0.0))  # which leaves any number as it is
