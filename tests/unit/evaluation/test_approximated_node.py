"""Rows of missing tokens as part of a tree, for every way of cutting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import (
    Approximated,
    Cast,
    Expression,
    Noise,
    Runs,
    Scale,
    from_json,
    gathered,
    needed,
    rows,
    to_json,
)
from mergekit_ray.core.plan import OutputTensor
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.evaluation.strategy import Strategy, choose
from mergekit_ray.planning.windows import Window, windows
from support.memory_inputs import Inputs, evaluate
from support.references.approximations import approximate

SHARED, MISSING, MODEL_WIDTH, DONOR_WIDTH = 90, 41, 12, 20
WITH_DONOR = ["common_interpolation", "landmark_pca", "omp"]
WITHOUT = ["john_hewitt", "mean", "randn", "zero"]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """An embedding of `MODEL_WIDTH`, a donor's of `DONOR_WIDTH`, and rows of both."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.inputs = Inputs()
        self.model = normal(SHARED + 9, MODEL_WIDTH, seed=1, dtype=dtype)
        self.donor = normal(SHARED + MISSING, DONOR_WIDTH, seed=2, dtype=dtype)
        self.order = torch.randperm(SHARED + MISSING, generator=torch.Generator().manual_seed(3))
        self.shared, self.missing = self.order[:SHARED].sort().values, self.order[SHARED:].sort().values
        self.ours = torch.arange(SHARED).flip(0)
        self.load_model = self.inputs.load("model", self.model, "model.embed")
        self.load_donor = self.inputs.load("donor", self.donor, "donor.embed")

    def part(self, load: Any, picked: torch.Tensor) -> Expression:
        spec = TensorSpec(load.spec.name, load.spec.dtype, (len(picked), load.spec.shape[1]))
        return gathered([load], spec, Runs.of_rows([0] * len(picked), picked.tolist()))

    def tree(self, method: str, dtype: DType = DType.F32, **parameters: Any) -> Approximated:
        spec = TensorSpec("embed", dtype, (MISSING, MODEL_WIDTH))
        if method not in WITH_DONOR:
            return Approximated(method, spec, self.load_model, None, None, parameters, "key")
        model_shared = self.part(self.load_model, self.ours)
        ours = self.part(self.load_donor, self.shared), self.part(self.load_donor, self.missing)
        return Approximated(method, spec, model_shared, *ours, parameters, "key")

    def expected(self, method: str, **parameters: Any) -> torch.Tensor:
        if method not in WITH_DONOR:
            return approximate(method, self.model, rows=MISSING, **parameters)
        donor = self.donor[self.shared].contiguous(), self.donor[self.missing].float()
        return approximate(method, self.model[self.ours].contiguous(), *donor, **parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", [*WITH_DONOR, *WITHOUT])
def test_like_the_method_alone_for_every_cut(method: str, dtype: torch.dtype) -> None:
    case = Case(dtype)
    for result in (DType.F32, DType.BF16):
        tree = case.tree(method, result)
        assert from_json(to_json(tree)) == tree
        expected = case.expected(method).to(TORCH_DTYPES[result])
        for threads, chunk, window in ((1, 1 << 16, None), (3, 50, None), (2, 7, 5 * MODEL_WIDTH)):
            found = evaluate(tree, case.inputs, num_threads=threads, chunk_elements=chunk, window=window)
            assert torch.equal(found, expected)


def test_parameters_are_the_methods() -> None:
    case = Case()
    given = {"k": 3, "metric": "cosine", "weights": "barycentric"}
    found = evaluate(case.tree("common_interpolation", **given), case.inputs)
    assert torch.equal(found, case.expected("common_interpolation", **given))


def test_rows_of_it_among_others() -> None:
    """An embedding in the donor's order: every row from where it is, whatever the windows."""
    case = Case()
    missing = case.tree("omp", DType.BF16, k=4)
    part, row = [], []
    ours, theirs = iter(case.ours.tolist()), iter(range(MISSING))
    for i in range(SHARED + MISSING):
        is_shared = bool((case.shared == i).any())
        part.append(0 if is_shared else 1)
        row.append(next(ours) if is_shared else next(theirs))
    spec = TensorSpec("embed", DType.BF16, (SHARED + MISSING, MODEL_WIDTH))
    tree = rows([case.load_model, missing], spec, Runs.of_rows(part, row))
    assert tree.access is Access.ELEMENTWISE
    expected = torch.empty(SHARED + MISSING, MODEL_WIDTH, dtype=torch.bfloat16)
    expected[case.shared] = case.model[case.ours]
    expected[case.missing] = case.expected("omp", k=4).bfloat16()
    for window in (None, 4 * MODEL_WIDTH, 31 * MODEL_WIDTH):
        assert torch.equal(evaluate(tree, case.inputs, num_threads=2, window=window), expected)


def test_scaled_with_noise_and_from_what_is_computed() -> None:
    case = Case(torch.float32)
    tree = case.tree("omp")
    doubled = replace(
        tree,
        donor_shared=Scale(tree.donor_shared, 2.0, DType.F32),  # type: ignore[arg-type] # computed, not stored
        donor_missing=Cast(Scale(tree.donor_missing, 2.0, DType.F32), DType.F32),  # type: ignore[arg-type] # computed, not stored
    )
    expected = case.expected("omp")
    found = evaluate(doubled, case.inputs, window=6 * MODEL_WIDTH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    noisy = Noise(Scale(tree, 0.5, DType.F32), "normal", 0.25, "noise", DType.F32)
    assert float((evaluate(noisy, case.inputs) - 0.5 * expected).std()) == pytest.approx(0.25, rel=0.2)


def test_a_window_needs_all_shared_rows_and_its_own() -> None:
    tree = Case().tree("omp")
    found = {leaf.spec.shape: run for leaf, run in needed(tree, 3 * MODEL_WIDTH + 1, 5 * MODEL_WIDTH).items()}
    assert found == {
        (SHARED, MODEL_WIDTH): (0, SHARED * MODEL_WIDTH),
        (SHARED, DONOR_WIDTH): (0, SHARED * DONOR_WIDTH),
        (MISSING, DONOR_WIDTH): (3 * DONOR_WIDTH, 5 * DONOR_WIDTH),
    }
    assert tree.unit == MODEL_WIDTH


def test_what_it_holds_is_projected() -> None:
    """The result in float32, and matrices whose dtype loops do not take."""
    bf16, f16 = (Case(dtype).tree("omp") for dtype in (torch.bfloat16, torch.float16))
    assert bf16.scratch_bytes > 4 * MISSING * MODEL_WIDTH
    assert f16.scratch_bytes - bf16.scratch_bytes == 4 * SHARED * (MODEL_WIDTH + DONOR_WIDTH)
    more = replace(bf16, parameters={"k": 128})
    assert more.scratch_bytes > bf16.scratch_bytes


def test_windows_are_whole_rows() -> None:
    tree = Case().tree("omp")
    output = OutputTensor(tree.spec, tree, 0, tree.spec.num_bytes)
    cut = list(windows(output, max_bytes=1))
    assert cut[0].start == 0
    assert cut[-1].stop == tree.spec.num_elements
    assert all(isinstance(each, Window) and each.num_elements % MODEL_WIDTH == 0 for each in cut)


def test_it_is_computed_on_the_cpu() -> None:
    assert choose(Case().tree("omp"), "cuda").strategy is Strategy.TORCH


@pytest.mark.parametrize("place", ["model", "donor"])
def test_a_nan_is_told(place: str) -> None:
    case = Case()
    load = case.load_model if place == "model" else case.load_donor
    case.inputs.data[load][:] = float("nan")
    with pytest.raises(MergeError, match="nan in the input"):
        evaluate(case.tree("omp"), case.inputs, references={"model": "MODEL", "donor": "DONOR"})
    assert evaluate(case.tree("omp"), case.inputs, allow_non_finite=True).isnan().all()


def test_parts_that_do_not_fit_are_refused() -> None:
    case = Case()
    tree = case.tree("omp")
    wrong: list[dict[str, Any]] = [
        {"donor_missing": None},
        {"donor_shared": None},
        {"model_shared": case.load_model},
        {"donor_shared": case.load_model},
        {"donor_missing": case.load_donor},
        {"spec": TensorSpec("embed", DType.F32, (MISSING, MODEL_WIDTH + 1))},
        {"spec": TensorSpec("embed", DType.F32, (MISSING * MODEL_WIDTH,))},
        {"spec": TensorSpec("embed", DType.I32, (MISSING, MODEL_WIDTH))},
    ]
    for changes in wrong:
        with pytest.raises(ValueError, match="'embed'"):
            replace(tree, **changes)
