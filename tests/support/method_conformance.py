"""What every merge method must do, whatever its formula: subclass `MethodConformance` and give it cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from support.memory_inputs import Inputs, evaluate
from support.operands import merge
from support.references.merge import Array, Expected, ulp

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (5, 0), (7,), (1, 9), (9, 1), (64, 33), (3, 5, 7)]

Reference = Callable[[Sequence[Array], "Array | None"], Expected]


@dataclass(frozen=True)
class Case:
    """One method with parameters, as YAML names, and its formula.

    Attributes:
        reference: of the models and the base in float64.
        parameters: global ones.
        weights: of the models; empty if the method has none.
        num_models: if it has none.
        has_base: whether a base is given.
    """

    method: str
    reference: Reference
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    num_models: int = 1
    has_base: bool = True

    def __str__(self) -> str:
        parameters = [f"{name}={value}" for name, value in self.parameters.items()]
        return "-".join([*parameters, str(self.weights or self.num_models), "base" if self.has_base else "no base"])

    def tensors(
        self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(shape, generator=generator)
        shared = torch.randn(shape, generator=generator)
        count = len(self.weights) or self.num_models
        xs = [(base + 0.3 * shared + 0.4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
        return xs, base.to(dtype) if self.has_base else None

    def merge(self, xs: Sequence[torch.Tensor], base: torch.Tensor | None, **options: Any) -> torch.Tensor:
        per_model = [{"weight": weight} for weight in self.weights] or None
        return merge(self.method, xs, base, parameters=self.parameters, input_parameters=per_model, **options)

    def expected(self, xs: Sequence[torch.Tensor], base: torch.Tensor | None) -> Expected:
        return self.reference([as_float64(x) for x in xs], None if base is None else as_float64(base))


def as_float64(x: torch.Tensor) -> Array:
    return x.to(torch.float64).numpy()


class MethodConformance:
    """The tests; subclasses are found by pytest."""

    CASES: ClassVar[Sequence[Case]]
    ROUNDINGS: ClassVar[int] = 8
    """Of float32, each at most 2^-24 of the terms' magnitudes, that the formula needs."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.CASES, ids=str)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_formula(self, case: Case, dtype: torch.dtype) -> None:
        for shape in SHAPES:
            xs, base = case.tensors(shape, dtype)
            result = case.merge(xs, base)
            assert result.dtype == dtype
            assert result.shape == shape
            case.expected(xs, base).check(result, roundings=self.ROUNDINGS)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_one_rounding_of_a_16_bit_output(self, case: Case, dtype: torch.dtype) -> None:
        """Where terms do not cancel, float32 arithmetic leaves nothing but the rounding of the output: half an ulp."""
        xs, base = case.tensors((40, 50), dtype)
        expected = case.expected(xs, base)
        steady = expected.is_stable & (np.abs(expected.value) > expected.magnitude / 16)
        errors = np.abs(as_float64(case.merge(xs, base)) - expected.value) / ulp(expected.value, dtype)
        assert steady.sum() > 1000
        assert errors[steady].max() < 0.51

    @pytest.mark.parametrize("shape", [(401, 700), (3, 100_003), (100_003, 3), (300_001,), (7, 201, 199)], ids=str)
    def test_beyond_one_block_and_for_any_chunk_size(self, case: Case, shape: tuple[int, ...]) -> None:
        xs, base = case.tensors(shape, torch.bfloat16)
        whole = case.merge(xs, base, out_dtype=torch.float32)
        assert torch.isfinite(whole).all()
        if len(shape) < 3 and shape[0] < 1000:
            case.expected(xs, base).check(whole, roundings=self.ROUNDINGS)
        for chunk_elements in (1 << 16, 99_991):
            assert torch.equal(case.merge(xs, base, out_dtype=torch.float32, chunk_elements=chunk_elements), whole)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(2011,), (5, 67, 6)], ids=str)
    def test_any_chunk_size_in_any_compute_dtype(self, case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        xs, base = case.tensors(shape, dtype)
        whole = case.merge(xs, base, compute_dtype=dtype)
        assert torch.isfinite(whole).all()
        for chunk_elements in (7, 64, 1000):
            assert torch.equal(case.merge(xs, base, compute_dtype=dtype, chunk_elements=chunk_elements), whole)

    def test_float64_arithmetic(self, case: Case) -> None:
        xs, base = case.tensors((33, 40), torch.float32)
        result = case.merge(xs, base, compute_dtype=torch.float64, out_dtype=torch.float64)
        case.expected(xs, base).check(result, roundings=100 * self.ROUNDINGS, unit=2.0**-53)

    def test_number_of_threads(self, case: Case) -> None:
        for shape in ((5, 100_001), (401, 700)):
            xs, base = case.tensors(shape, torch.float32)
            threads = torch.get_num_threads()
            try:
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(case.merge(xs, base))
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])

    def test_evaluator_and_its_threads(self, case: Case) -> None:
        xs, base = case.tensors((700, 801), torch.bfloat16)
        inputs = Inputs()
        tree = Merge(
            case.method,
            TensorSpec("out", DType.F32, (700, 801)),
            tuple(inputs.load(f"model {index}", x) for index, x in enumerate(xs)),
            base=None if base is None else inputs.load("base", base),
            parameters=case.parameters,
            input_parameters=tuple({"weight": weight} for weight in case.weights) or ({},) * len(xs),
            keys=tuple(f"model {index}" for index in range(len(xs))),
        )
        expected = case.merge(xs, base, out_dtype=torch.float32)
        for num_threads, chunk_elements in ((1, 1 << 18), (3, 1 << 18), (2, 50_001)):
            assert torch.equal(evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements), expected)

    def test_zero_tensors(self, case: Case) -> None:
        for shape in ((300,), (6, 5), ()):
            zeros = torch.zeros(shape)
            count = len(case.weights) or case.num_models
            merged = case.merge([zeros] * count, zeros if case.has_base else None)
            assert torch.equal(merged, zeros)

    def test_models_equal_to_the_base_leave_it_bit_for_bit(self, case: Case) -> None:
        xs, base = case.tensors((1000,), torch.float32)
        if base is not None:
            assert torch.equal(case.merge([base] * len(xs), base), base)

    def test_inputs_are_not_changed(self, case: Case) -> None:
        xs, base = case.tensors((10, 10), torch.float32)
        tensors = [*xs, *([] if base is None else [base])]
        before = [x.clone() for x in tensors]
        case.merge(xs, base)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


class PropagatingConformance(MethodConformance):
    """Of methods that promise that a NaN or infinity shows in the result."""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_inputs_show_in_the_result(self, case: Case, bad: float) -> None:
        """Whichever tensor is damaged."""
        assert METHODS.get(case.method).propagates_non_finite
        xs, base = case.tensors((6, 5), torch.float32)
        tensors = [*xs, *([] if base is None else [base])]
        for damaged in tensors:
            kept = damaged[2, 3].clone()
            damaged[2, 3] = bad
            assert not torch.isfinite(case.merge(xs, base)).all()
            damaged[2, 3] = kept
