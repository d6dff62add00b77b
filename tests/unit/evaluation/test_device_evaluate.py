"""Evaluation on a device, on one that is simulated: the CPU's results, in any amount of memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Load, Merge, Scale
from mergekit_ray.evaluation.device.copies import SLOT_BYTES
from mergekit_ray.evaluation.device.evaluate import MIN_CHUNK_ELEMENTS, DeviceEvaluation, DeviceSession, chunk_bytes
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS
from mergekit_ray.methods.ties import Ties
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
from support.simulated_device import SimulatedDevice

MIB = 1 << 20

# Decompositions of what is not a number fail inside LAPACK, on every processor by another of its errors.
DECOMPOSING = ("iso_c", "iso_cts", "tsv_m", "wudi")


def session_on(device: SimulatedDevice, slot_bytes: int = 1 << 17, **options: Any) -> DeviceSession:
    return DeviceSession(device, ComputePool(1), slot_bytes=slot_bytes, **options)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ON_DEVICES, ids=str)
def test_every_method(case: MethodCase) -> None:
    inputs = Inputs()
    tree = case.tree(inputs, torch.float32)
    expected = evaluate(tree, inputs)
    for streamed in (False, True):
        device = SimulatedDevice()
        found = on_device(session_on(device), tree, inputs, streamed=streamed)
        if case.is_exact:
            assert torch.equal(found, expected)
        else:
            assert_close(found, expected, case.tolerance)
        if tree.base is not None:
            assert isinstance(tree.base, Load)
            base = inputs.data[tree.base].view(case.shape)
            assert_same_choices(found, expected, base)
        assert bool(device.memory.peak_bytes) != (streamed and tree.access is Access.WHOLE)


@pytest.mark.parametrize("name", KIND_CASES | FACTOR_CASES)
def test_every_other_kind(name: str) -> None:
    inputs = Inputs()
    tree = (KIND_CASES | FACTOR_CASES)[name](inputs)
    expected = evaluate(tree, inputs)
    found = on_device(session_on(SimulatedDevice(), slot_bytes=1 << 11), tree, inputs)
    if name in FACTOR_CASES or name.startswith("DoRA"):
        assert_close(found, expected, 1e-6)
    else:
        assert torch.equal(found, expected)
        assert torch.equal(on_device(session_on(SimulatedDevice()), tree, inputs, streamed=True), expected)


@pytest.mark.parametrize("case", [case for case in ON_DEVICES if case.shape == SHAPE], ids=str)
def test_waits_for_the_device_do_not_grow_with_the_tensor(case: MethodCase) -> None:
    """Three times the blocks and the chunks: the same questions are asked."""
    waits = []
    for rows in (SHAPE[0], 3 * SHAPE[0]):
        inputs, device = Inputs(), SimulatedDevice()
        tree = dataclasses.replace(case, shape=(rows, SHAPE[1])).tree(inputs, torch.float32)
        on_device(session_on(device), tree, inputs)
        waits.append(device.memory.num_waits)
    # Where an order statistic is not unique, two more are asked for each model, in one tensor or the other.
    assert abs(waits[1] - waits[0]) <= 3 * len(case.weights)
    assert waits[0] < 40


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1 << 16])
@pytest.mark.parametrize("slot_bytes", [999, 1 << 14, SLOT_BYTES])
def test_any_way_of_cutting_gives_the_same_bits(window: int | None, slot_bytes: int) -> None:
    inputs = Inputs()
    tree = MethodCase("dare_ties", {"rescale": False}, weighted(0.3, 0.5, density=0.4)).tree(inputs)
    session = session_on(SimulatedDevice(), slot_bytes)
    assert torch.equal(on_device(session, tree, inputs, window=window), evaluate(tree, inputs))


def ties(shape: tuple[int, ...] = SHAPE) -> tuple[Merge, Inputs, torch.Tensor]:
    inputs = Inputs()
    tree = MethodCase("ties", {}, weighted(0.3, 0.5, density=0.4), shape=shape).tree(inputs)
    return tree, inputs, evaluate(tree, inputs)


@pytest.mark.parametrize("streamed", [False, True])
def test_parts_of_a_window_share_its_statistics(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, inputs, expected = ties()
    asked, statistics = [], Ties.statistics

    def counted(self: Ties, operands: Any) -> Any:
        asked.append(operands)
        return statistics(self, operands)

    monkeypatch.setattr(Ties, "statistics", counted)
    found = on_device(session_on(SimulatedDevice()), tree, inputs, part=12_345, streamed=streamed)
    assert torch.equal(found, expected)
    assert len(asked) == 1


def test_memory_is_given_back() -> None:
    tree, inputs, expected = ties()
    device = SimulatedDevice()
    session = session_on(device)
    for _ in range(3):
        assert torch.equal(on_device(session, tree, inputs), expected)
    session.make_room()
    assert device.memory.used_bytes <= 64 * 1024 * 4, "tables of random numbers at most"


def test_what_does_not_fit_is_streamed_in_smaller_chunks() -> None:
    """Of 1.6 MB of inputs, on a device with room for a block and for the smallest chunk."""
    tree, inputs, expected = ties()
    device = SimulatedDevice(15 * MIB)
    session = session_on(device, budget_bytes=1 * MIB)
    pieces = inputs.pieces(tree)
    assert session.stage(tree, pieces) is None
    assert session.chunk_elements(tree, 3) == MIN_CHUNK_ELEMENTS
    assert torch.equal(on_device(session, tree, inputs), expected)
    assert device.memory.peak_bytes <= 15 * MIB


def test_chunks_are_halved_where_memory_turns_out_not_to_suffice() -> None:
    inputs = Inputs()
    xs = [inputs.load(f"m{i}", normal(i, (600_000,), torch.float32)) for i in range(3)]
    tree = Merge("linear", xs[0].spec, tuple(xs), None, {}, weighted(0.2, 0.3, 0.5), ("",) * 3)
    # Told of more memory than it has: the inputs, and what a quarter of a chunk takes.
    device = SimulatedDevice(7_200_000 + 4 * MIB)
    session = session_on(device, slot_bytes=SLOT_BYTES, budget_bytes=1 << 30)
    assert session.chunk_elements(tree, 3) > 600_000
    assert torch.equal(on_device(session, tree, inputs), evaluate(tree, inputs))
    assert device.num_made_room >= 2
    assert device.memory.peak_bytes <= device.memory.capacity_bytes


def test_blocks_are_halved_where_memory_turns_out_not_to_suffice() -> None:
    tree, inputs, expected = ties((1200, 1009))
    device = SimulatedDevice(30 * MIB)
    session = session_on(device, budget_bytes=8 << 30)
    most = session.pool.block_elements
    assert most > tree.spec.num_elements
    assert torch.equal(on_device(session, tree, inputs), expected)
    assert BLOCK_ELEMENTS <= session.pool.block_elements < most
    assert device.memory.peak_bytes <= device.memory.capacity_bytes


def test_sessions_share_what_is_free() -> None:
    tree, inputs, _ = ties()
    alone, shared = (session_on(SimulatedDevice(12 * MIB), num_sharing=number) for number in (1, 8))
    pieces = inputs.pieces(tree)
    assert alone.stage(tree, pieces) is not None
    assert shared.stage(tree, pieces) is None


@pytest.mark.parametrize("case", [case for case in ON_DEVICES if case.shape == SHAPE], ids=str)
def test_the_size_of_blocks_does_not_matter(case: MethodCase) -> None:
    inputs = Inputs()
    tree = dataclasses.replace(case, shape=(1200, 1009)).tree(inputs)
    found = []
    for block_elements in (BLOCK_ELEMENTS, 4 * BLOCK_ELEMENTS):
        session = session_on(SimulatedDevice())
        session.pool.block_elements = block_elements
        found.append(on_device(session, tree, inputs))
    assert torch.equal(*found)


def test_too_little_for_the_smallest_chunk_is_an_error_that_says_so() -> None:
    tree, inputs, _ = ties()
    session = session_on(SimulatedDevice(MIB // 2))
    with pytest.raises(MergeError) as caught:
        on_device(session, tree, inputs)
    assert caught.value.where == "tensor 'out'"
    assert f"{chunk_bytes(MIN_CHUNK_ELEMENTS, 3)} bytes" in caught.value.what
    assert "the simulated device" in caught.value.what
    assert "`device='cpu'`" in str(caught.value)


@pytest.mark.parametrize("told_bytes", [None, 1 << 30])
def test_a_whole_tensor_that_does_not_fit_is_computed_on_the_cpu(told_bytes: int | None) -> None:
    """Whether that is known beforehand or found out."""
    inputs = Inputs()
    tree = MethodCase("iso_c", {}, weighted(1.0, 0.5), shape=(60, 41)).tree(inputs)
    pieces = inputs.pieces(tree)
    session = session_on(SimulatedDevice(60_000), budget_bytes=told_bytes)
    staged = session.stage(tree, pieces)
    assert (staged is None) == (told_bytes is None)
    evaluation = DeviceEvaluation(session, tree, pieces, staged)
    out = torch.empty(60 * 41, dtype=torch.bfloat16)
    finishes = [
        evaluation.start(first, last, out[first:last], is_last=last == len(out))
        for first, last in ((0, 1000), (1000, 60 * 41))
    ]
    for finish in finishes:
        finish()
    assert evaluation.lacked_memory
    assert torch.equal(out.view(60, 41), evaluate(tree, inputs))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    inputs = Inputs()
    x = inputs.load("a", normal(0, (100,)))
    tree = Merge("linear", x.spec, (x, x), None, {}, weighted(1.0, -1.0), ("",) * 2)
    with pytest.raises(MergeError, match="sum to 0") as caught:
        on_device(session_on(SimulatedDevice()), tree, inputs)
    assert caught.value.where == "tensor 'w'"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", sorted({case.method for case in ON_DEVICES} - {*DECOMPOSING}))
def test_a_bad_input_is_named_as_on_the_cpu(method: str, streamed: bool) -> None:
    inputs = Inputs()
    case = next(case for case in ON_DEVICES if case.method == method and case.shape == SHAPE)
    tree = case.tree(inputs)
    damaged = tree.inputs[0]
    assert isinstance(damaged, Load)
    inputs.data[damaged][123_456] = float("nan")
    with pytest.raises(MergeError) as caught:
        on_device(session_on(SimulatedDevice()), tree, inputs, streamed=streamed, references={"model 0": "org/damaged"})
    assert caught.value.where == "model org/damaged, tensor 'w'"
    assert "nan in the input, first at flat index 123456 (1 such value read)" in caught.value.what
    allowed = on_device(session_on(SimulatedDevice()), tree, inputs, allow_non_finite=True)
    torch.testing.assert_close(allowed, evaluate(tree, inputs, allow_non_finite=True), equal_nan=True)


@pytest.mark.parametrize("kind", ["cast", "scale", "merge"])
def test_overflow_is_told_as_on_the_cpu(kind: str) -> None:
    inputs = Inputs()
    x = inputs.load("m1", torch.full((100,), 70_000.0))
    spec = dataclasses.replace(x.spec, dtype=DType.F16)
    tree = {
        "cast": Cast(x, DType.F16),
        "scale": Scale(x, 2.0, DType.F16),
        "merge": Merge("linear", spec, (x,), None, {}, weighted(1.0), ("",)),
    }[kind]
    with pytest.raises(MergeError) as there:
        on_device(session_on(SimulatedDevice()), tree, inputs)
    with pytest.raises(MergeError) as here:
        evaluate(tree, inputs)
    assert str(there.value) == str(here.value)
    assert torch.isinf(on_device(session_on(SimulatedDevice()), tree, inputs, allow_non_finite=True)).all()


def test_largest_numbers_do_not_overflow() -> None:
    inputs = Inputs()
    x = torch.full((1000,), torch.finfo(torch.float32).max)
    tree = Scale(inputs.load("m1", x), 1.0, DType.F32)
    assert torch.equal(on_device(session_on(SimulatedDevice()), tree, inputs), x)
