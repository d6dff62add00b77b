"""Evaluation on a CUDA device: the CPU's choices to the bit and its results within an ulp, in any amount of memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Load
from mergekit_ray.evaluation.device.copies import SLOT_BYTES
from mergekit_ray.evaluation.device.cuda import CudaDevice
from mergekit_ray.evaluation.device.evaluate import MIN_CHUNK_ELEMENTS, DeviceSession
from mergekit_ray.evaluation.pool import ComputePool
from support.device_cases import (
    FACTOR_CASES,
    KIND_CASES,
    ON_DEVICES,
    SHAPE,
    MethodCase,
    assert_close,
    assert_same_choices,
    normal,
    on_device,
    weighted,
)
from support.memory_inputs import Inputs, evaluate

pytestmark = pytest.mark.gpu

LARGE = (2049, 4099)
"""8.4 million elements: several blocks, and more than one pinned buffer."""


def session_on(device: CudaDevice, slot_bytes: int = SLOT_BYTES, **options: Any) -> DeviceSession:
    return DeviceSession(device, ComputePool(1), slot_bytes=slot_bytes, **options)


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ON_DEVICES, ids=str)
def test_every_method(case: MethodCase, dtype: torch.dtype, streamed: bool, device: CudaDevice) -> None:
    inputs = Inputs()
    tree = case.tree(inputs, dtype)
    expected = evaluate(tree, inputs)
    found = on_device(session_on(device, slot_bytes=1 << 18), tree, inputs, streamed=streamed)
    if case.is_exact:
        assert torch.equal(found, expected)
    else:
        assert_close(found, expected, case.tolerance)
    if tree.base is not None and dtype == torch.float32:
        assert isinstance(tree.base, Load)
        assert_same_choices(found, expected, inputs._data[tree.base].view(case.shape))


@pytest.mark.parametrize("case", [case for case in ON_DEVICES if case.shape == SHAPE], ids=str)
def test_large_tensors(case: MethodCase, device: CudaDevice) -> None:
    inputs = Inputs()
    tree = dataclasses.replace(case, shape=LARGE).tree(inputs, torch.float32)
    expected = evaluate(tree, inputs, num_threads=4)
    found = on_device(session_on(device), tree, inputs)
    if case.is_exact:
        assert torch.equal(found, expected)
    else:
        assert_close(found, expected, case.tolerance)
    if tree.base is not None:
        assert isinstance(tree.base, Load)
        assert_same_choices(found, expected, inputs._data[tree.base].view(LARGE))


@pytest.mark.parametrize("name", KIND_CASES | FACTOR_CASES)
def test_every_other_kind(name: str, device: CudaDevice) -> None:
    inputs = Inputs()
    tree = (KIND_CASES | FACTOR_CASES)[name](inputs)
    expected = evaluate(tree, inputs)
    found = on_device(session_on(device, slot_bytes=1 << 11), tree, inputs)
    if name in FACTOR_CASES or name.startswith(("DoRA", "LoRA")):
        assert_close(found, expected, 1e-6)
    else:
        assert torch.equal(found, expected)
        assert torch.equal(on_device(session_on(device), tree, inputs, streamed=True), expected)


@pytest.mark.parametrize("window", [None, 1 << 16])
@pytest.mark.parametrize("slot_bytes", [999, 1 << 14, SLOT_BYTES])
def test_any_way_of_cutting_gives_the_same_bits(window: int | None, slot_bytes: int, device: CudaDevice) -> None:
    inputs = Inputs()
    tree = MethodCase("dare_ties", {"rescale": False}, weighted(0.3, 0.5, density=0.4)).tree(inputs)
    found = on_device(session_on(device, slot_bytes), tree, inputs, window=window)
    assert torch.equal(found, evaluate(tree, inputs))


@pytest.mark.parametrize("method", ["ties", "sce", "slerp", "della"])
def test_the_same_twice(method: str, device: CudaDevice) -> None:
    """Results with sums in them, too, on one device."""
    inputs = Inputs()
    case = next(case for case in ON_DEVICES if case.method == method)
    tree = dataclasses.replace(case, shape=LARGE).tree(inputs)
    first = on_device(session_on(device), tree, inputs)
    assert torch.equal(on_device(session_on(device), tree, inputs), first)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "sce", "arcee_fusion"])
def test_what_does_not_fit_is_computed_all_the_same(method: str, device: CudaDevice) -> None:
    """128 MB of the device for 67 MB of inputs and what methods need beside them, and told of far more."""
    inputs = Inputs()
    case = next(case for case in ON_DEVICES if case.method == method)
    tree = dataclasses.replace(case, shape=LARGE).tree(inputs)
    expected = evaluate(tree, inputs, num_threads=4)
    session = session_on(device, budget_bytes=8 << 30)
    total = torch.cuda.get_device_properties(device.torch_device).total_memory
    torch.cuda.set_per_process_memory_fraction((128 << 20) / total, device.torch_device)
    found = on_device(session, tree, inputs)
    if case.is_exact:
        assert torch.equal(found, expected)
    else:
        assert_close(found, expected)


def test_a_small_budget_is_kept(device: CudaDevice) -> None:
    inputs = Inputs()
    case = next(case for case in ON_DEVICES if case.method == "ties")
    tree = dataclasses.replace(case, shape=LARGE).tree(inputs)
    budget_bytes = 64 << 20
    session = session_on(device, budget_bytes=budget_bytes)
    assert session.chunk_elements(tree, 4) >= MIN_CHUNK_ELEMENTS
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    before = torch.cuda.memory_allocated(device.torch_device)
    assert torch.equal(on_device(session, tree, inputs), evaluate(tree, inputs, num_threads=4))
    peak = torch.cuda.max_memory_allocated(device.torch_device) - before
    # Uploads run a few pinned buffers ahead beside it.
    assert peak <= budget_bytes + 5 * SLOT_BYTES


def test_memory_is_given_back(device: CudaDevice) -> None:
    inputs = Inputs()
    tree = MethodCase("ties", {}, weighted(0.3, 0.5, density=0.4)).tree(inputs)
    before = torch.cuda.memory_allocated(device.torch_device)
    session = session_on(device)
    for _ in range(3):
        on_device(session, tree, inputs)
    session.make_room()
    assert torch.cuda.memory_allocated(device.torch_device) - before <= 1 << 20


@pytest.mark.parametrize("method", sorted({case.method for case in ON_DEVICES}))
def test_a_bad_input_is_named(method: str, device: CudaDevice) -> None:
    inputs = Inputs()
    case = next(case for case in ON_DEVICES if case.method == method)
    tree = case.tree(inputs)
    damaged = tree.inputs[0]
    assert isinstance(damaged, Load)
    index = damaged.spec.num_elements // 2
    inputs._data[damaged][index] = float("inf")
    with pytest.raises(MergeError) as caught:
        on_device(session_on(device), tree, inputs, references={"model 0": "org/damaged"})
    assert caught.value.where == f"model org/damaged, tensor {damaged.spec.name!r}"
    assert f"inf in the input, first at flat index {index}" in caught.value.what


def test_overflow_is_told(device: CudaDevice) -> None:
    inputs = Inputs()
    xs = tuple(inputs.load(f"m{i}", torch.full((100,), 60_000.0)) for i in range(2))
    tree = dataclasses.replace(
        MethodCase("linear", {"normalize": False}, weighted(1.0, 1.0), has_base=False).tree(Inputs()),
        spec=dataclasses.replace(xs[0].spec, dtype=DType.F16),
        inputs=xs,
        keys=("", ""),
    )
    with pytest.raises(MergeError, match="overflow float16"):
        on_device(session_on(device), tree, inputs)


def test_two_sessions_share_a_device(device: CudaDevice) -> None:
    inputs = Inputs()
    tree = MethodCase("slerp", {"t": 0.4}, ({},), is_exact=False).tree(inputs)
    sessions = [session_on(device) for _ in range(2)]
    results = [on_device(session, tree, inputs) for session in sessions]
    assert torch.equal(*results)
    assert_close(results[0], evaluate(tree, inputs))


def test_pinned_memory_is_what_the_device_copies_from(device: CudaDevice) -> None:
    assert device.host_buffer(1 << 20).is_pinned()
    assert not normal(0, (4,)).is_pinned()
