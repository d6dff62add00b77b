"""How a shard's work is cut so that it fits in memory: pure arithmetic on the plan.

A *window* is a run of elements of one output tensor that is read, computed and written at one go. Tensors whose
expression is elementwise all the way down are cut into windows of bounded size; others are one window each. A *batch*
is consecutive windows whose reads are issued together, so that small tensors do not cost a request each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Expression, Load, is_copy
from mergekit_ray.core.plan import OutputTensor, Plan, Shard
from mergekit_ray.core.sizes import format_bytes

WINDOW_BYTES = 32 << 20
"""Aim for the inputs and output of one window of an elementwise tensor."""

BATCH_BYTES = 32 << 20
"""Aim for the inputs and outputs of one batch."""

READS_AHEAD = 2
"""Batches that are being read from a store at once: a store far away takes its time to answer, but answers many. With
more, those that are wanted first come no sooner than the rest, and nothing is computed and written meanwhile."""

_BATCHES_IN_WORK = 4
"""Batches beside those being read, where inputs are far: computed, or on their way to the store."""

FIXED_BYTES = 320 << 20
"""Allowance of a worker beside its windows: scratch of up to eight compute threads (about 20 MiB each) and parts being
uploaded (80 MiB for shards up to 150 GB, of the shard that ends and the one that begins)."""

_WINDOW_ALIGNMENT = 1 << 16
"""Windows start at multiples of this many elements."""


@dataclass(frozen=True, slots=True)
class Window:
    """Elements ``[start, stop)`` of one output tensor."""

    tensor: OutputTensor
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Elements computed."""
        return self.stop - self.start

    @property
    def write_bytes(self) -> int:
        """Bytes of output."""
        return self.num_elements * self.tensor.spec.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of input."""
        return sum((stop - start) * load.spec.dtype.itemsize for load, (start, stop) in self.needs.items())

    @property
    def needs(self) -> dict[Load, tuple[int, int]]:
        """What is read: each load with its run of elements."""
        return _needed(self.tensor.expression, self.start, self.stop)

    @property
    def memory_bytes(self) -> int:
        """Bytes held while it is worked on: inputs, output (a copy needs none of its own), whole-tensor scratch."""
        if is_copy(self.tensor.expression):
            return self.read_bytes
        return self.read_bytes + self.write_bytes + self.tensor.expression.scratch_bytes


def _needed(expression: Expression, start: int, stop: int) -> dict[Load, tuple[int, int]]:
    """Every load with the run of its elements that elements ``[start, stop)`` of the result need."""
    found: dict[Load, tuple[int, int]] = {}
    for load, first, last in expression.needs(start, stop):
        known_first, known_last = found.get(load, (first, last))
        found[load] = (min(known_first, first), max(known_last, last))
    return found


def windows(tensor: OutputTensor, max_bytes: int = WINDOW_BYTES) -> Iterator[Window]:
    """Cut one tensor. An empty tensor has no windows."""
    num_elements = tensor.spec.num_elements
    if num_elements == 0:
        return
    whole = Window(tensor, 0, num_elements)
    if tensor.expression.access is not Access.ELEMENTWISE:
        yield whole
        return
    step = _step(whole, max_bytes)
    for start in range(0, num_elements, step):
        yield Window(tensor, start, min(start + step, num_elements))


def _step(whole: Window, max_bytes: int) -> int:
    """Elements of a window that takes about ``max_bytes``, beside what every window of the tensor needs anew."""
    unit = whole.tensor.expression.unit
    aligned = min(_WINDOW_ALIGNMENT if unit == 1 else unit, whole.num_elements)
    least = Window(whole.tensor, 0, aligned).memory_bytes
    if aligned == whole.num_elements:
        return aligned
    per_element = (whole.memory_bytes - least) / (whole.num_elements - aligned)
    fixed_bytes = max(0, int(least - per_element * aligned))
    # What does not shrink with the window (the factors of a LoRA) is read at most about once more than the rest.
    room = max(max_bytes - fixed_bytes, fixed_bytes)
    return max(1, int(room / per_element) // aligned) * aligned


def batches(shard: Shard, memory_bytes: int) -> Iterator[list[Window]]:
    """The shard's windows in file order, grouped for reading.

    Args:
        shard: to be cut.
        memory_bytes: the worker's budget. A batch takes at most a third of it where its windows allow, so that one can
            be read while another is computed and a third is written.
    """
    limit = max(1, min(BATCH_BYTES, (memory_bytes - FIXED_BYTES) // 3))
    batch: list[Window] = []
    held = 0
    for tensor in shard.tensors:
        for window in windows(tensor, min(WINDOW_BYTES, limit)):
            if batch and held + window.memory_bytes > limit:
                yield batch
                batch, held = [], 0
            batch.append(window)
            held += window.memory_bytes
    if batch:
        yield batch


def largest_window(tensors: Sequence[OutputTensor]) -> Window | None:
    """The window that needs the most memory, None if there is nothing to compute."""
    found = (window for tensor in tensors for window in _first(tensor))
    return max(found, key=lambda window: window.memory_bytes, default=None)


def memory_needed(plan: Plan) -> int:
    """Least budget of a worker, in bytes, that can run every shard of the plan."""
    largest = largest_window([tensor for shard in plan.shards for tensor in shard.tensors])
    return FIXED_BYTES + _rounded(0 if largest is None else largest.memory_bytes)


def comfortable_memory(plan: Plan) -> int:
    """A budget, in bytes, in which reading, computing and writing overlap; with room to read ahead from stores."""
    is_far = any("://" in model.uri for model in plan.inputs.values())
    return memory_needed(plan) + (READS_AHEAD + _BATCHES_IN_WORK if is_far else 4) * BATCH_BYTES


def check_memory(plan: Plan, memory_bytes: int) -> None:
    """Refuse a budget that is too small for the plan.

    Raises:
        PlanError: naming the tensor that does not fit and the bytes it needs.
    """
    needed = memory_needed(plan)
    if needed <= memory_bytes:
        return
    largest = largest_window([tensor for shard in plan.shards for tensor in shard.tensors])
    reserve = f"{format_bytes(FIXED_BYTES)} for the worker itself"
    raise PlanError(
        f"a memory budget of {format_bytes(memory_bytes)} per worker is too small: it needs {format_bytes(needed)} "
        f"({needed} bytes), {reserve}"
        + ("" if largest is None else f" and {format_bytes(needed - FIXED_BYTES)} for this tensor with its inputs"),
        where=None if largest is None else f"tensor {largest.tensor.spec.name!r}",
        remedy=f"pass --memory {-(-needed // 1_000_000)}MB or more",
    )


def _first(tensor: OutputTensor) -> Iterator[Window]:
    for window in windows(tensor):
        yield window
        return


def _rounded(num_bytes: int) -> int:
    """Buffers are taken in size classes up to an eighth larger than asked."""
    return num_bytes + num_bytes // 8
