"""WUDI-Merging: a merged task vector optimised, without data, to disturb no task's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import Operands, WholeMethod
from mergekit_ray.methods.shared.spectral import TaskMatrices, TaskWeightParameters, decomposition_bytes, total
from mergekit_ray.methods.shared.task_vectors import ScaledParameters

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
"""Decay of Adam's running means of the gradient and of its square."""

EPSILON = 1e-8
"""Adam's addition to the denominator."""


class WudiParameters(ScaledParameters):
    """Global parameters of `Wudi`."""

    steps: int = Field(300, description="steps of Adam", ge=0)
    learning_rate: float = Field(1e-5, description="learning rate of Adam", ge=0.0, allow_inf_nan=False)


@METHODS.register("wudi")
class Wudi(WholeMethod):
    """The ``τ`` that Adam finds for ``L(τ) = Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²`` from ``Σ τ_i``; ``τ_i = w_i δ_i``.

    Cheng et al. 2025, "Whoever Started the Interference Should End It". Frobenius norms; a weight is ``(out, in)``, so
    that ``τ_i τ_jᵀ`` compares their rows, which in a linear layer approximate its inputs. Adam has its usual
    β = (0.9, 0.999) and ε = 1e-8, and no randomness. λ is 1 in the paper: nothing is to be tuned.

    The gradient is ``2 (τ G − H)`` with ``G = Σ τ_iᵀτ_i / ‖τ_i‖²`` and ``H = Σ τ_i τ_iᵀτ_i / ‖τ_i‖²``: formed once (the
    Gram matrices in float64), a step takes one product of ``(m, n)`` by ``(n, n)``, however many models there are, and
    rows of ``τ`` do not depend on each other. Steps are done in compute dtype, at least float32. Each moves an
    element by about the learning rate, also where the gradient is nothing but rounding as large as ε: results in
    float32 and float64 differ there by some learning rates.

    A model equal to the base has no rows to disturb and adds nothing to the loss; if all but one are, that one's
    ``τ_i`` is the minimum and is kept as it is. The paper optimises linear layers. Here those are all two-dimensional
    weights, embeddings included; others are averaged, ``b + λ/N Σ τ_i`` (the paper leaves them open). A NaN or infinity
    in a matrix makes the whole result NaN.

    Memory: beside the inputs the matrix once more, and ``n²`` twice in float64, ``n`` the number of columns. Time:
    ``2 m n²`` operations a step, on one thread.
    """

    name = "wudi"
    summary = "Task vector optimised to interfere least with each model's own, without data."
    formula = (
        "b + λ·τ, τ by Adam from Σ τ_i for min Σ ‖(τ − τ_i)·τ_iᵀ‖²/‖τ_i‖², τ_i = w_i·δ_i; b + λ/N·Σ τ_i if not a matrix"
    )
    reference = "https://arxiv.org/abs/2503.08099"
    base = BaseUse.REQUIRED
    model_parameters = TaskWeightParameters
    global_parameters = WudiParameters
    propagates_non_finite = True

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`: beside decompositions, the optimiser's matrix."""
        return decomposition_bytes(shape, num_models, tensors_per_model=1) + math.prod(shape) * max(itemsize, 4)

    def combine_whole(
        self, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, operands: Operands
    ) -> torch.Tensor:
        """See `WholeMethod.combine_whole`. The inputs are not written to."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        assert base is not None  # held by the declaration: base REQUIRED
        weights = [parameters.weight for parameters in operands.input_parameters]
        settings: WudiParameters = operands.parameters
        if base.numel() == 0:
            return base
        if base.dim() != 2:
            columns = TaskMatrices([x.reshape(-1, 1) for x in inputs], base.reshape(-1, 1), weights)
            return columns.add_to_base(total, settings.lambda_ / len(inputs)).reshape(base.shape)
        tasks = TaskMatrices(inputs, base, weights)
        if not tasks.is_finite():
            return torch.full_like(base, float("nan"))
        return _optimised(tasks, settings)


def _optimised(tasks: TaskMatrices, settings: WudiParameters) -> torch.Tensor:
    """``b + λ τ`` in the base's dtype."""
    import torch  # noqa: PLC0415

    dtype = torch.promote_types(tasks.base.dtype, torch.float32)
    gram, target, num_changed = _normal_equations(tasks, dtype)
    out = torch.empty_like(tasks.base)
    for start, stop in tasks.runs():
        merged = total(tasks.rows(start, stop))
        if num_changed > 1 and settings.steps > 0:
            merged = _descend(merged.to(dtype), gram, target[start:stop], settings)
        out[start:stop] = merged.to(torch.float64).mul_(settings.lambda_).add_(tasks.base[start:stop])
    return out


def _normal_equations(tasks: TaskMatrices, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """``2G``, ``2H`` in ``dtype``, and how many task vectors are not zero."""
    import torch  # noqa: PLC0415

    gram = torch.zeros((tasks.num_columns,) * 2, dtype=torch.float64, device=tasks.base.device)
    target = torch.zeros_like(tasks.base, dtype=dtype)
    num_changed = 0
    for index in range(len(tasks.inputs)):
        own = torch.zeros_like(gram)
        for start, stop in tasks.runs():
            delta = tasks.rows_of(index, start, stop)
            own.addmm_(delta.mT, delta)
        squared_norm = float(own.diagonal().sum())
        if squared_norm == 0.0:
            continue
        num_changed += 1
        gram.add_(own.mul_(2.0 / squared_norm))
        for start, stop in tasks.runs():
            target[start:stop] += (tasks.rows_of(index, start, stop) @ own).to(dtype)
    return gram.to(dtype), target, num_changed


def _descend(merged: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, settings: WudiParameters) -> torch.Tensor:
    """Rows of ``τ`` after all steps of Adam, in place of ``merged``, where it starts."""
    import torch  # noqa: PLC0415

    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    gradient = torch.empty_like(merged)
    for step in range(1, settings.steps + 1):
        torch.mm(merged, gram, out=gradient).sub_(target)
        first.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = torch.sqrt(second, out=gradient).mul_((1 - BETAS[1] ** step) ** -0.5).add_(EPSILON)
        merged.addcdiv_(first, size, value=-settings.learning_rate / (1 - BETAS[0] ** step))
    return merged
