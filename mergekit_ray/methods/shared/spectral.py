"""Singular vectors of task vectors, for methods that see a weight as a matrix.

A matrix is worked on with its longer side as rows (transposed if need be) and in runs of rows, in float64: an
orthogonal factorisation of one run under the triangle of the runs before gives a triangle ``R`` with ``XᵀX = RᵀR``
without ever forming ``XᵀX``, which would lose half the digits, and so all singular values and right singular vectors
of ``X`` to the accuracy of float64. Left singular vectors are ``X V Σ⁻¹`` and are formed where they are used. Beside
the tensors themselves memory grows with the square of the shorter side ``n`` only: an embedding of 128k x 4k takes no
more of it than a matrix of 4k x 4k. Time grows with ``m n²``, and some ten times ``n³``, for each factorisation.

Directions whose singular value is zero up to rounding (`ZERO_SINGULAR_VALUE`) have no direction to speak of; they are
left out wherever singular vectors are used, instead of whatever basis a library completes them with. With that the
polar factor, ``U Vᵀ`` of ``X = U Σ Vᵀ``, is unique for every matrix.

Results do not depend on the number of the evaluator's threads: one thread does all the work on a matrix.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.methods.shared.protocol import Operands, WholeMethod
from mergekit_ray.methods.shared.task_vectors import ScaledParameters

if TYPE_CHECKING:
    import torch

ZERO_SINGULAR_VALUE = 64 * sys.float_info.epsilon
"""Singular values up to this part of the largest, times the number of columns, are rounding."""

RUN_ELEMENTS = 1 << 20
"""Elements of a run, about; at least as many rows as columns."""

RowMap: TypeAlias = Callable[[Sequence["torch.Tensor"]], "torch.Tensor"]
"""From the same rows of all task vectors, each ``(rows, n)`` in float64, to rows of a matrix made of them."""


class TaskWeightParameters(Parameters):
    """Per-model parameter of methods whose papers have no weights."""

    weight: float = Field(1.0, description="factor on the model's task vector", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class TaskMatrices:
    """The task vectors ``w_i (x_i − b)`` of one weight as float64 matrices, made run by run.

    Attributes:
        inputs: the models' matrices ``(m, n)`` in any dtype; never written to.
        base: the base's.
        weights: ``w_i``.
        is_transposed: whether these are the transposes of the weights as they are stored.
    """

    inputs: Sequence[torch.Tensor]
    base: torch.Tensor
    weights: Sequence[float]
    is_transposed: bool = False

    @classmethod
    def tall(cls, inputs: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float]) -> TaskMatrices:
        """With at least as many rows as columns."""
        if base.shape[0] >= base.shape[1]:
            return cls(inputs, base, weights)
        return cls([x.mT for x in inputs], base.mT, weights, is_transposed=True)

    @property
    def num_columns(self) -> int:
        """The shorter side, for `tall` ones."""
        return self.base.shape[1]

    def runs(self) -> Iterator[tuple[int, int]]:
        """First row and end of each run. They depend on the shape alone."""
        num_rows, step = self.base.shape[0], max(self.num_columns, RUN_ELEMENTS // self.num_columns)
        for start in range(0, num_rows, step):
            yield start, min(start + step, num_rows)

    def rows(self, start: int, stop: int) -> list[torch.Tensor]:
        """Rows ``[start, stop)`` of all task vectors."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        base = self.base[start:stop].to(torch.float64)
        pairs = zip(self.inputs, self.weights, strict=True)
        return [(x[start:stop].to(torch.float64) - base).mul_(weight) for x, weight in pairs]

    def rows_of(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of task vector ``index``."""
        import torch  # noqa: PLC0415

        own, base = (x[start:stop].to(torch.float64) for x in (self.inputs[index], self.base))
        return (own - base).mul_(self.weights[index])

    def map(self, function: RowMap) -> Iterator[torch.Tensor]:
        """``function`` of every run."""
        return (function(self.rows(start, stop)) for start, stop in self.runs())

    def map_one(self, index: int) -> Iterator[torch.Tensor]:
        """Every run of task vector ``index``."""
        return (self.rows_of(index, start, stop) for start, stop in self.runs())

    def norm(self, index: int) -> float:
        """Frobenius norm of task vector ``index``."""
        return math.sqrt(math.fsum(float(run.square().sum()) for run in self.map_one(index)))

    def is_finite(self) -> bool:
        """Whether all task vectors are finite: a NaN or an infinity in one shows in their sum."""
        import torch  # noqa: PLC0415

        return all(bool(torch.isfinite(summed).all()) for summed in self.map(total))

    def add_to_base(self, merged: RowMap, scale: float) -> torch.Tensor:
        """``b + scale · merged`` in the base's dtype, in the shape and order of the weights as they are stored."""
        import torch  # noqa: PLC0415

        stored = torch.empty_like(
            self.base.mT if self.is_transposed else self.base, memory_format=torch.contiguous_format
        )
        out = stored.mT if self.is_transposed else stored
        for start, stop in self.runs():
            change = merged(self.rows(start, stop)).mul_(scale)
            out[start:stop] = change.add_(self.base[start:stop])
        return stored


def total(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum, a tensor of its own; there is at least one."""
    remaining = iter(terms)
    result = next(remaining).clone()
    for term in remaining:
        result.add_(term)
    return result


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is kept of ``X = U Σ Vᵀ``, largest singular values first.

    Attributes:
        values: singular values, ``(r,)``; those that are rounding are exactly zero.
        right: ``V``, ``(n, r)``; columns of zero singular values are zero.
        to_left: ``V Σ⁻¹``, so that ``U = X · to_left``; columns of zero singular values are zero.
    """

    values: torch.Tensor
    right: torch.Tensor
    to_left: torch.Tensor

    def leading(self, rank: int) -> Spectrum:
        """The ``rank`` largest; copies, so that the memory of the others is free."""
        return Spectrum(self.values[:rank].clone(), self.right[:, :rank].clone(), self.to_left[:, :rank].clone())

    @property
    def whitening(self) -> torch.Tensor:
        """``V Σ⁻¹ Vᵀ``: ``X · whitening`` is the polar factor ``U Vᵀ`` of ``X``."""
        return self.to_left @ self.right.mT


def spectrum(runs: Iterable[torch.Tensor], *, size: float = 0.0) -> Spectrum:
    """Singular values and vectors of the matrix whose runs of rows these are.

    Args:
        runs: float64 matrices with the same number of columns; at least one.
        size: norm of a matrix of which this is what is left after a subtraction: if more than its own, zero is what is
            small against that.
    """
    import torch  # noqa: PLC0415

    triangle: torch.Tensor | None = None
    for run in runs:
        below = run if triangle is None else torch.cat([triangle, run])
        triangle = torch.linalg.qr(below, mode="r").R
    assert triangle is not None  # there are no windows of empty tensors
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    right = right.mT
    is_zero = values <= values[:1].clamp_min(size) * (ZERO_SINGULAR_VALUE * right.shape[0])
    values = values.masked_fill(is_zero, 0.0)
    right = right.masked_fill(is_zero, 0.0)
    return Spectrum(values, right, right / values.masked_fill(is_zero, 1.0))


def polar_factor(x: torch.Tensor) -> torch.Tensor:
    """``U Vᵀ`` of ``X = U Σ Vᵀ``, zero singular values left out: of all partial isometries the nearest to ``X``.

    For ``X`` of full column rank it is the solution of the orthogonal Procrustes problem ``min ‖Q − X‖, QᵀQ = I``.
    """
    return x @ spectrum([x]).whitening


def recombined(tasks: TaskMatrices, left: RowMap, values: torch.Tensor, right: torch.Tensor) -> RowMap:
    """``U⊥ diag(values) V⊥ᵀ`` from singular vectors of several matrices side by side.

    Args:
        tasks: what ``left`` is made of.
        left: ``U``, ``(m, r)``, left singular vectors in columns that are not orthogonal to each other.
        values: of each column, ``(r,)``.
        right: ``V``, ``(n, r)``, the right singular vectors.

    Returns:
        The product of the polar factors of ``U`` and ``V`` with the values between them. It does not depend on the
        signs that a decomposition gives pairs of singular vectors.
    """
    whitening = spectrum(tasks.map(left)).whitening
    factor = (whitening * values) @ polar_factor(right).mT
    return lambda deltas: left(deltas) @ factor


def decomposition_bytes(shape: tuple[int, ...], num_models: int, tensors_per_model: int = 6) -> int:
    """What decompositions of task matrices hold: float64 matrices of the shorter side, and runs of rows.

    Args:
        shape: of the tensor.
        num_models: beside the base.
        tensors_per_model: square matrices of the shorter side for each model, measured as peak resident memory.
    """
    run_bytes = 8 * RUN_ELEMENTS * (num_models + 4)
    if len(shape) != 2:
        return run_bytes
    return run_bytes + 8 * (16 + tensors_per_model * num_models) * min(shape) ** 2


class SpectralMethod(WholeMethod):
    """A method on matrices: two-dimensional weights are merged by `merged_matrix`, all others are averaged.

    Of weights with no or one dimension, and with more than two (convolutions, stacked experts), the task vectors are
    averaged: ``b + λ/N Σ w_i δ_i``, as the authors' published code does. A NaN or infinity anywhere in a matrix makes
    the whole result NaN.
    """

    base = BaseUse.REQUIRED
    model_parameters = TaskWeightParameters
    global_parameters: ClassVar[type[Parameters]] = ScaledParameters
    propagates_non_finite = True

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        del itemsize
        return decomposition_bytes(shape, num_models)

    @abstractmethod
    def merged_matrix(self, tasks: TaskMatrices, operands: Operands) -> RowMap:
        """Rows of the merged task vector from rows of the models' (all finite), before λ."""

    def combine_whole(
        self, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, operands: Operands
    ) -> torch.Tensor:
        """See `WholeMethod.combine_whole`. The inputs are not written to."""
        import torch  # noqa: PLC0415

        assert base is not None  # held by the declaration: base REQUIRED
        weights = [parameters.weight for parameters in operands.input_parameters]
        scale = operands.parameters.lambda_
        if base.numel() == 0:
            return base
        if base.dim() != 2 or scale == 0:  # nothing is added: no need to find out of what
            columns = TaskMatrices([x.reshape(-1, 1) for x in inputs], base.reshape(-1, 1), weights)
            return columns.add_to_base(total, scale / len(inputs)).reshape(base.shape)
        tasks = TaskMatrices.tall(inputs, base, weights)
        if not tasks.is_finite():
            return torch.full_like(base, float("nan"))
        return tasks.add_to_base(self.merged_matrix(tasks, operands), scale)
