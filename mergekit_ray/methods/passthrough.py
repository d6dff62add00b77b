"""One model's tensor as it is, or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import Chunk, ElementwiseMethod, Operands

if TYPE_CHECKING:
    import torch


class PassthroughModelParameters(Parameters):
    """Per-model parameters of `Passthrough`."""

    scale: float | None = Field(
        None, description="factor on the tensor; without it the bytes are copied", allow_inf_nan=False
    )


@METHODS.register("passthrough")
class Passthrough(ElementwiseMethod):
    """``x``, or ``scale · x``.

    Planning lowers it to a copy or a scaling of the input, so that unscaled bytes are never decoded; as a method it
    gives the same values.
    """

    name = "passthrough"
    summary = "One model's tensors as they are, or scaled; for layer stacking."
    formula = "x, times scale if given"
    max_models = 1
    model_parameters = PassthroughModelParameters
    propagates_non_finite = True

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        del statistics
        (x,) = chunk.inputs
        scale = operands.input_parameters[0].scale
        return x if scale is None else x.mul_(scale)
