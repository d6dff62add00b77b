"""One expert, one router: the expressions of the tensors that a Mixture of Experts has and a dense model has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from mergekit_ray.config.fields import ComputeDType
from mergekit_ray.config.moe_recipe import ExpertRecipe, GateMode, MoeRecipe
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Constant, Expression, Literal, Noise, Scale
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Lowering, Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPUTE_DTYPES: Final = {ComputeDType.FLOAT32: DType.F32, ComputeDType.FLOAT64: DType.F64, ComputeDType.INPUTS: None}
"""What a recipe's ``compute_dtype`` means; None for the inputs' own."""


class RouterVectors(Protocol):
    """Routers made from prompts, and what is known of existing routers.

    Attributes:
        vectors: for each layer ``[num_experts, hidden]``. Empty if the routers are random.
        shared: for each layer ``[1, hidden]``: what opens the shared expert. Empty if it has no prompts.
        lengths: for each layer the length that new rows are to have, of the mean of existing ones. Empty if the
            routers are new.
        warnings: what the user should know of them.
    """

    @property
    def vectors(self) -> Mapping[int, NDArray[np.float32]]: ...  # noqa: D102 - see the class

    @property
    def shared(self) -> Mapping[int, NDArray[np.float32]]: ...  # noqa: D102 - see the class

    @property
    def lengths(self) -> Mapping[int, float]: ...  # noqa: D102 - see the class

    @property
    def warnings(self) -> Sequence[str]: ...  # noqa: D102 - see the class


Routing = Callable[[], RouterVectors]
"""Reads the base model and makes the routers; called once, when all else is known to be right."""


def routed(routing: Routing | None, result: Lowering, unrouted: str) -> RouterVectors | None:
    """The routers that prompts or the base model give; None, and a warning, where they are not to be made yet.

    Args:
        routing: makes them.
        result: gets the warnings.
        unrouted: what is said of a plan without them.
    """
    if routing is None:
        result.warnings.append(unrouted)
        return None
    routers = routing()
    result.warnings += routers.warnings
    return routers


class ExpertLowering:
    """Builds expressions of single tensors.

    Args:
        recipe: says dtypes, seed and how routers are made.
        base: gives everything else, and the dtypes where the recipe names none.
        hidden: size of the hidden state.
    """

    def __init__(self, recipe: MoeRecipe, base: Model, hidden: int) -> None:
        self._recipe = recipe
        self._base = base
        self._hidden = hidden

    def copy(self, model: Model, name: str) -> Expression:
        """A tensor as it is, in the dtype that is stored."""
        return rounded(model.weights.expression(name), self.stored(model, name))

    def stored(self, model: Model, name: str) -> DType:
        """The dtype that a tensor made of one of ``model`` is stored in."""
        return self._recipe.dtype or model.weights.specs[name].dtype

    def expert(
        self, target: str, stored: DType, source: tuple[Model, str], expert: ExpertRecipe, *, is_residual: bool
    ) -> Expression:
        """A feed-forward tensor of an expert's model: its bytes if nothing is asked for but a copy.

        Args:
            target: name of the expert's tensor. It names the noise, so that any layout of experts gets the same.
            stored: dtype of the result.
            source: the dense model and the name of its tensor.
            expert: noise and factor.
            is_residual: whether the tensor writes to the residual stream.
        """
        model, name = source
        x = model.weights.expression(name)
        compute = COMPUTE_DTYPES[self._recipe.compute_dtype] or self.stored(model, name)
        factor = expert.residual_scale if is_residual else None
        is_scaled = factor is not None and factor != 1.0
        if expert.noise_scale:
            key = f"{self._recipe.seed}\n{target}\nnoise"
            x = Noise(x, "normal", expert.noise_scale, key, compute if is_scaled else stored, compute)
        if is_scaled and factor is not None:
            return Scale(x, factor, stored, compute)
        return rounded(x, stored)

    def router(
        self, spec: TensorSpec, key: str, vectors: NDArray[np.float32] | None, length: float | None = None
    ) -> Expression:
        """Rows of a router.

        Args:
            spec: of the result, ``[num_rows, hidden]``.
            key: names the stream of random numbers.
            vectors: the rows, float32, where they come from prompts. None for zeros.
            length: that rows are to have, in the mean; None for unit vectors, a standard normal distribution, or a
                uniform one within ±1/√hidden.
        """
        mode = self._recipe.gate_mode
        if mode.needs_prompts:
            if vectors is None:
                return Constant(spec, 0.0)
            scaled = vectors if length is None else vectors * length
            return Literal.of(spec, scaled.astype("<f4").tobytes())
        # E|row|² = hidden · σ², and a uniform distribution within ±a has σ = a/√3.
        sigma = None if length is None else length * self._hidden**-0.5
        zero = Constant(TensorSpec(spec.name, DType.F32, spec.shape), 0.0)
        if mode is GateMode.RANDOM:
            return Noise(zero, "normal", 1.0 if sigma is None else sigma, key, spec.dtype)
        width = self._hidden**-0.5 if sigma is None else sigma * 3**0.5
        return Noise(zero, "uniform", width, key, spec.dtype)


def rounded(x: Expression, dtype: DType) -> Expression:
    """An expression in a dtype."""
    return x if x.spec.dtype is dtype else Cast(x, dtype)
