"""Windows, batches, and the memory they are projected to take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Cast, Expression, Load, Merge, Scale
from mergekit_ray.core.plan import InputModel, OutputTensor, Plan, Shard
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, WholeMethod
from mergekit_ray.planning.windows import (
    BATCH_BYTES,
    FIXED_BYTES,
    MAX_PART_BYTES,
    batches,
    check_memory,
    comfortable_memory,
    is_mapped,
    largest_window,
    mapped_models,
    memory_needed,
    thread_bytes,
    windows,
)

ALIGNMENT = 1 << 16
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _whole_method() -> Iterator[None]:
    """A method that must see everything, registered for these tests."""

    class WholeForTests(WholeMethod):
        name = "whole_for_tests"

    METHODS.names()
    METHODS.register(WholeForTests.name)(WholeForTests)
    yield
    del METHODS._entries[WholeForTests.name]


def load(model: int, num_elements: int, name: str = "w") -> Load:
    spec = TensorSpec(name, DType.BF16, (num_elements,))
    return Load(f"m{model}", spec, Location("f", 0, spec.num_bytes))


def merge(method: str, num_elements: int, num_inputs: int = 2, *, base: bool = False, **parameters: object) -> Merge:
    return Merge(
        method,
        TensorSpec("w", DType.BF16, (num_elements,)),
        tuple(load(i, num_elements) for i in range(num_inputs)),
        load(9, num_elements) if base else None,
        parameters,
        ({},) * num_inputs,
        ("",) * num_inputs,
    )


def tensor(expression: Expression, name: str = "w") -> OutputTensor:
    spec = TensorSpec(name, expression.spec.dtype, expression.spec.shape)
    return OutputTensor(spec, expression, 0, spec.num_bytes)


def test_access_is_the_most_that_any_node_needs() -> None:
    elementwise, reduce = merge("linear", 4), merge("slerp", 4, 1, base=True)
    assert load(0, 4).access is Access.ELEMENTWISE
    assert Cast(Scale(elementwise, 2.0, DType.F32), DType.F16).access is Access.ELEMENTWISE
    assert reduce.access is Access.REDUCE
    assert Scale(reduce, 2.0, DType.F32).access is Access.REDUCE
    assert Merge("linear", reduce.spec, (reduce,), None, {}, ({},), ("",)).access is Access.REDUCE
    assert merge("whole_for_tests", 4).access is Access.WHOLE
    assert merge("dare_linear", 4, base=True, rescale=True).access is Access.REDUCE
    assert merge("dare_linear", 4, base=True, rescale=False).access is Access.ELEMENTWISE


def test_scratch_grows_with_the_tensor_only_where_all_of_it_is_needed() -> None:
    assert merge("linear", 1000).scratch_bytes == 0
    assert merge("slerp", 1000, 1, base=True).scratch_bytes == 0
    # Two inputs, the base and the result, in float32.
    assert merge("whole_for_tests", 1000, 2, base=True).scratch_bytes == 4 * 1000 * 4


def test_memory_of_a_window() -> None:
    [copied] = windows(tensor(load(0, 1000)))
    assert (copied.read_bytes, copied.write_bytes, copied.memory_bytes) == (2000, 2000, 2000)
    [merged] = windows(tensor(merge("linear", 1000, 3)))
    assert (merged.read_bytes, merged.write_bytes, merged.memory_bytes) == (6000, 2000, 8000)


def test_what_is_mapped_is_held_by_nobody_and_results_leave_in_parts() -> None:
    num_elements = 512 * MIB
    large = tensor(merge("slerp", num_elements, 1, base=True))
    result = 2 * MAX_PART_BYTES
    [read] = windows(large)
    assert read.memory_bytes == 2 * read.write_bytes + result
    [mapped] = windows(large, mapped={"m0", "m9"})
    assert mapped.memory_bytes == BATCH_BYTES + result
    [one] = windows(large, mapped={"m9"})
    assert one.memory_bytes == num_elements * 2 + BATCH_BYTES + result
    # Small pieces are read all the same, and so are those that are not aligned.
    assert not is_mapped(load(0, MIB // 2 - 1), (0, MIB // 2 - 1), {"m0"})
    spec = TensorSpec("w", DType.BF16, (MIB,))
    assert is_mapped(load(0, MIB), (0, MIB), {"m0"})
    assert not is_mapped(Load("m0", spec, Location("f", 1, 1 + spec.num_bytes)), (0, MIB), {"m0"})


@pytest.mark.parametrize(
    ("method", "places", "mask_bits"),
    [("ties", 3, 0), ("breadcrumbs", 6, 0), ("pcb", 3, 0), ("sce", 1, 1), ("della", 0, 6), ("arcee_fusion", 3, 0)],
)
def test_statistics_that_grow_with_the_tensor_are_counted(method: str, places: int, mask_bits: int) -> None:
    num_elements = 64 * MIB
    num_inputs = 1 if method == "arcee_fusion" else 3
    held = (places + 2) * 4 * (MIB + num_elements // 20) if places else 0
    found = merge(method, num_elements, num_inputs, base=True).scratch_bytes
    assert found == held + mask_bits * num_elements // 8


def test_scratch_of_threads_grows_with_the_number_of_inputs() -> None:
    def plan_of(expression: Expression) -> Plan:
        return Plan({}, (Shard("a", b"", (tensor(expression),)),), {}, (), {}, 0)

    assert CHUNK_ELEMENTS == BLOCK_ELEMENTS  # of which scratch is made
    for expression in (load(0, 1000), merge("linear", 1000, 3), merge("ties", 1000, 11, base=True)):
        assert thread_bytes(plan_of(expression)) == 0
    # The inputs, the base and eight more runs of a method, each 1 MiB; 20 MiB are in the fixed part.
    many = plan_of(merge("ties", 1000, 40, base=True))
    assert thread_bytes(many) == 8 * (41 + 8 - 20) * MIB
    assert memory_needed(many) > FIXED_BYTES + thread_bytes(many)


def test_files_are_mapped_where_they_are_local() -> None:
    uris = {"a": "/models/a", "b": "s3://bucket/b", "c": "hf://c/d"}
    assert mapped_models({key: InputModel(key, key, uri, {}) for key, uri in uris.items()}) == {"a"}


EXPRESSIONS = st.integers(0, 5 * ALIGNMENT + 7).flatmap(
    lambda n: st.sampled_from(
        [
            load(0, n),
            Cast(load(0, n), DType.F64),
            merge("linear", n, 3),
            merge("slerp", n, 1, base=True),
            merge("whole_for_tests", n),
        ]
    )
)


@given(EXPRESSIONS, st.integers(1, 2 * MIB))
def test_windows_cover_a_tensor_once_in_order(expression: Expression, max_bytes: int) -> None:
    found = list(windows(tensor(expression), max_bytes))
    position = 0
    for window in found:
        assert window.start == position
        assert window.stop > window.start
        position = window.stop
    assert position == expression.spec.num_elements
    if expression.access is Access.ELEMENTWISE:
        for window in found:
            assert window.start % ALIGNMENT == 0
            assert window.memory_bytes <= max_bytes or window.num_elements <= ALIGNMENT
    else:
        assert len(found) == (expression.spec.num_elements > 0)


@given(st.lists(EXPRESSIONS, max_size=6), st.integers(1, 4 * MIB))
@settings(max_examples=60)
def test_batches_are_all_windows_in_order_within_the_limit(expressions: list[Expression], spare: int) -> None:
    shard = Shard("f", b"", tuple(tensor(x, f"t{i}") for i, x in enumerate(expressions)))
    limit = max(1, min(BATCH_BYTES, spare // 3))
    found = list(batches(shard, FIXED_BYTES + spare))
    position = {t.spec.name: 0 for t in shard.tensors}
    for batch in found:
        assert batch
        assert len(batch) == 1 or sum(window.memory_bytes for window in batch) <= limit
        for window in batch:
            assert window.start == position[window.tensor.spec.name]
            position[window.tensor.spec.name] = window.stop
    assert position == {t.spec.name: t.spec.num_elements for t in shard.tensors}
    order = [window.tensor.spec.name for batch in found for window in batch]
    assert order == sorted(order, key=lambda name: int(name[1:]))


@dataclass(frozen=True)
class Sized:
    plan: Plan
    largest_bytes: int


@pytest.fixture
def sized() -> Sized:
    num_elements = 80 * MIB
    big, small = merge("slerp", num_elements, 1, base=True), merge("linear", 80 * MIB)
    shards = (
        Shard("a", b"", (tensor(small, "streamed"), tensor(big, "whole"))),
        Shard("b", b"", (tensor(load(0, 10), "little"),)),
    )
    # Two tensors are read, and two parts of the result are held.
    return Sized(Plan({}, shards, {}, (), {}, 0), 2 * 2 * num_elements + 2 * MAX_PART_BYTES)


def test_the_largest_window(sized: Sized) -> None:
    found = largest_window(sized.plan.shards[0].tensors)
    assert found is not None
    assert (found.tensor.spec.name, found.memory_bytes) == ("whole", sized.largest_bytes)
    assert largest_window([]) is None
    assert largest_window([tensor(load(0, 0))]) is None


def test_a_budget_too_small_is_refused_with_tensor_and_bytes(sized: Sized) -> None:
    needed = memory_needed(sized.plan)
    assert needed == FIXED_BYTES + sized.largest_bytes * 9 // 8
    check_memory(sized.plan, needed)
    check_memory(sized.plan, comfortable_memory(sized.plan))
    with pytest.raises(PlanError) as caught:
        check_memory(sized.plan, needed - 1)
    assert caught.value.where == "tensor 'whole'"
    assert f"({needed} bytes)" in caught.value.what
    assert "336 MB for the worker itself and " in caught.value.what
    assert f"{format_bytes(needed - FIXED_BYTES)} for this tensor with its inputs" in caught.value.what
    assert caught.value.remedy is not None
    found = re.findall(r"`options=MergeOptions\(memory_bytes=(\d+_000_000)\)`", caught.value.remedy)
    [enough] = [int(number) for number in found]
    check_memory(sized.plan, enough)
    with pytest.raises(PlanError):
        check_memory(sized.plan, enough - 10**6)


def test_an_empty_plan_needs_the_fixed_part() -> None:
    assert memory_needed(Plan({}, (), {}, (), {}, 0)) == FIXED_BYTES
