"""How a shard's work is cut so that it fits in memory: pure arithmetic on the plan.

A *window* is a run of elements of one output tensor that is read, computed and written at one go. Tensors whose
expression is elementwise all the way down are cut into windows of bounded size; others are one window each. A *batch*
is consecutive windows whose reads are issued together, so that small tensors do not cost a request each.

A worker holds less than a window reads and writes: large inputs in local files are mapped where they lie, and the
result leaves in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Gather, Load, Stored, is_copy, needed, stored
from mergekit_ray.core.plan import InputModel, OutputTensor, Plan, Shard
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS

WINDOW_BYTES = 32 << 20
"""Aim for the inputs and output of one window of an elementwise tensor."""

BATCH_BYTES = 32 << 20
"""Aim for the inputs and outputs of one batch."""

READS_AHEAD = 2
"""Batches that are being read from a store at once: a store far away takes its time to answer, but answers many. With
more, those that are wanted first come no sooner than the rest, and nothing is computed and written meanwhile."""

_BATCHES_IN_WORK = 4
"""Batches beside those being read, where inputs are far: computed, or on their way to the store."""

MIN_MAPPED_BYTES = 1 << 20
"""Smaller pieces of local files are copied: a mapping costs more."""

SCATTERED_BYTES = 1 << 30
"""Aim for the inputs and output of a window of rows that lie scattered over tensors in stores, if the budget is not
given: nearly all of such a tensor is read for each window, whatever its size."""

_MAX_TURNS = 16
"""How often the rows of a window may go back in a tensor of a store before they count as scattered."""

SPAN_BYTES = 2 << 20
"""Of rows that lie near each other in a file, and what lies between, that are read together."""

SPANS_AT_ONCE = 16
"""Spans of a process that are being read, each into memory of its own."""

MAX_PART_BYTES = 32 << 20
"""The most that a part of a result has, but for a few elements that make it whole (see `worker.parts.cut`)."""

PARTS_AT_ONCE = 2
"""Parts of a window: one that is computed, and one that is written."""

_THREADS = 8
"""Compute threads of a worker, at most."""

_THREAD_BYTES = 20 << 20
"""Scratch of a thread that `FIXED_BYTES` has room for."""

FIXED_BYTES = 320 << 20
"""Allowance of a worker beside its windows: scratch of eight compute threads (20 MiB each) and parts being uploaded
(80 MiB for shards up to 150 GB, of the shard that ends and the one that begins)."""

_WINDOW_ALIGNMENT = 1 << 16
"""Windows start at multiples of this many elements."""


@dataclass(frozen=True, slots=True)
class Window:
    """Elements ``[start, stop)`` of one output tensor."""

    tensor: OutputTensor
    start: int
    stop: int
    mapped: AbstractSet[str] = frozenset()
    """Keys of the models whose files are mapped where they lie."""

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
        return sum(leaf.read_bytes(*run) for leaf, run in self.needs.items())

    @property
    def input_bytes(self) -> int:
        """Bytes that its inputs take in memory."""
        return sum(held_bytes(leaf, run) for leaf, run in self.needs.items())

    @property
    def needs(self) -> dict[Stored, tuple[int, int]]:
        """What is read: each leaf with its run of elements."""
        return needed(self.tensor.expression, self.start, self.stop)

    @property
    def memory_bytes(self) -> int:
        """Bytes held while it is worked on: inputs, parts of the output (a copy needs none of its own), scratch.

        Of inputs that are mapped, `BATCH_BYTES` at most are counted, so that reading does not run far ahead.
        """
        mapped = sum(held_bytes(leaf, run) for leaf, run in self.needs.items() if is_mapped(leaf, run, self.mapped))
        inputs = self.input_bytes - mapped + min(mapped, BATCH_BYTES)
        inputs += min(SPANS_AT_ONCE * SPAN_BYTES, sum(_bytes_in_spans(leaf, self.mapped) for leaf in self.needs))
        if is_copy(self.tensor.expression):
            return inputs
        return inputs + min(self.write_bytes, PARTS_AT_ONCE * MAX_PART_BYTES) + self.tensor.expression.scratch_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that pass through memory for it: inputs, output (a copy needs none of its own), scratch."""
        if is_copy(self.tensor.expression):
            return self.input_bytes
        return self.input_bytes + self.write_bytes + self.tensor.expression.scratch_bytes


def is_mapped(leaf: Stored, run: tuple[int, int], mapped: AbstractSet[str]) -> bool:
    """Whether a run of elements is used in place in a file of one of the ``mapped`` models."""
    if not isinstance(leaf, Load):
        return False
    is_aligned = leaf.location.start % leaf.spec.dtype.itemsize == 0
    return leaf.model in mapped and is_aligned and held_bytes(leaf, run) >= MIN_MAPPED_BYTES


def mapped_models(inputs: Mapping[str, InputModel]) -> frozenset[str]:
    """Keys of the models that are surely in local files: one from a hub may not be in its cache."""
    return frozenset(key for key, model in inputs.items() if "://" not in model.uri)


def held_bytes(leaf: Stored, run: tuple[int, int]) -> int:
    """What a run of elements takes in memory, if it is not mapped."""
    first, last = leaf.held(*run)
    return (last - first) * leaf.spec.dtype.itemsize


def is_scattered(tensor: OutputTensor, mapped: AbstractSet[str]) -> bool:
    """Whether a window has rows from all over a tensor that is not in a file of the ``mapped`` models.

    A tensor that is one window anyhow has them once.
    """
    return tensor.expression.access is Access.ELEMENTWISE and any(
        leaf.parts[index].model not in mapped and turns > _MAX_TURNS
        for leaf in stored(tensor.expression)
        if isinstance(leaf, Gather)
        for index, turns in leaf.runs.turns.items()
    )


def _bytes_in_spans(leaf: Stored, mapped: AbstractSet[str]) -> int:
    """Bytes of tensors whose rows are read in spans, from which they are copied to their places."""
    if not isinstance(leaf, Gather):
        return 0
    return sum(load.spec.num_bytes for load in leaf.parts if load.model not in mapped)


def windows(
    tensor: OutputTensor, max_bytes: int = WINDOW_BYTES, mapped: AbstractSet[str] = frozenset()
) -> Iterator[Window]:
    """Cut one tensor. An empty tensor has no windows."""
    num_elements = tensor.spec.num_elements
    if num_elements == 0:
        return
    whole = Window(tensor, 0, num_elements, mapped)
    if tensor.expression.access is not Access.ELEMENTWISE:
        yield whole
        return
    step = _step(whole, max_bytes)
    for start in range(0, num_elements, step):
        yield Window(tensor, start, min(start + step, num_elements), mapped)


def _step(whole: Window, max_bytes: int) -> int:
    """Elements of a window that takes about ``max_bytes``, beside what every window of the tensor needs anew."""
    unit = whole.tensor.expression.unit
    aligned = min(_WINDOW_ALIGNMENT if unit == 1 else unit, whole.num_elements)
    least = Window(whole.tensor, 0, aligned).num_bytes
    if aligned == whole.num_elements:
        return aligned
    per_element = (whole.num_bytes - least) / (whole.num_elements - aligned)
    fixed_bytes = max(0, int(least - per_element * aligned))
    # What does not shrink with the window (the factors of a LoRA) is read at most about once more than the rest.
    room = max(max_bytes - fixed_bytes, fixed_bytes)
    return max(1, int(room / per_element) // aligned) * aligned


def batches(shard: Shard, memory_bytes: int, mapped: AbstractSet[str] = frozenset()) -> Iterator[list[Window]]:
    """The shard's windows in file order, grouped for reading.

    Args:
        shard: to be cut.
        memory_bytes: the worker's budget. A batch takes at most a third of it where its windows allow, so that one can
            be read while another is computed and a third is written.
        mapped: keys of the models whose files are mapped where they lie.
    """
    limit = max(1, min(BATCH_BYTES, window_bytes(memory_bytes) // 3))
    batch: list[Window] = []
    held = 0
    for tensor in shard.tensors:
        # Two of what is scattered: one that is read, and one that is computed and written.
        most = max(limit, window_bytes(memory_bytes) // 2) if is_scattered(tensor, mapped) else min(WINDOW_BYTES, limit)
        for window in windows(tensor, most, mapped):
            if batch and held + window.num_bytes > limit:
                yield batch
                batch, held = [], 0
            batch.append(window)
            held += window.num_bytes
    if batch:
        yield batch


def largest_window(tensors: Sequence[OutputTensor], mapped: AbstractSet[str] = frozenset()) -> Window | None:
    """The window that needs the most memory, None if there is nothing to compute."""
    found = (window for tensor in tensors for window in _first(tensor, mapped))
    return max(found, key=lambda window: window.memory_bytes, default=None)


def memory_needed(plan: Plan) -> int:
    """Least budget of a worker, in bytes, that can run every shard of the plan."""
    largest = _largest(plan)
    return FIXED_BYTES + thread_bytes(plan) + _rounded(0 if largest is None else largest.memory_bytes)


def too_large(tensors: Sequence[OutputTensor], plan: Plan, memory_bytes: int) -> Iterator[OutputTensor]:
    """Those tensors of a plan that a worker with a budget of so many bytes has no room for."""
    room = memory_bytes - FIXED_BYTES - thread_bytes(plan)
    mapped = mapped_models(plan.inputs)
    for tensor in tensors:
        if any(_rounded(window.memory_bytes) > room for window in _first(tensor, mapped)):
            yield tensor


def thread_bytes(plan: Plan) -> int:
    """Scratch of the compute threads beyond what `FIXED_BYTES` has room for, in bytes: that of very many models."""
    expressions = (tensor.expression for shard in plan.shards for tensor in shard.tensors)
    per_element = max((x.chunk_bytes for x in expressions if not is_copy(x)), default=0)
    return _THREADS * max(0, per_element * BLOCK_ELEMENTS - _THREAD_BYTES)


def comfortable_memory(plan: Plan) -> int:
    """A budget, in bytes, in which reading, computing and writing overlap; with room to read ahead from stores."""
    is_far = any("://" in model.uri for model in plan.inputs.values())
    beside = _rounded((READS_AHEAD + _BATCHES_IN_WORK if is_far else 4) * BATCH_BYTES)
    mapped = mapped_models(plan.inputs)
    scattered = (tensor for shard in plan.shards for tensor in shard.tensors if is_scattered(tensor, mapped))
    of_windows = (window.memory_bytes for tensor in scattered for window in _first(tensor, mapped, SCATTERED_BYTES))
    return max(
        memory_needed(plan) + beside, FIXED_BYTES + thread_bytes(plan) + 2 * _rounded(max(of_windows, default=0))
    )


def window_bytes(memory_bytes: int) -> int:
    """What windows may take of a budget, in bytes as they are counted: their buffers are larger, see `_rounded`."""
    return (memory_bytes - FIXED_BYTES) * 8 // 9


def check_memory(plan: Plan, memory_bytes: int) -> None:
    """Refuse a budget that is too small for the plan.

    Raises:
        PlanError: naming the tensor that does not fit and the bytes it needs.
    """
    needed = memory_needed(plan)
    if needed <= memory_bytes:
        return
    largest = _largest(plan)
    reserve = f"{format_bytes(FIXED_BYTES)} for the worker itself"
    raise PlanError(
        f"a memory budget of {format_bytes(memory_bytes)} per worker is too small: it needs {format_bytes(needed)} "
        f"({needed} bytes), {reserve}"
        + ("" if largest is None else f" and {format_bytes(needed - FIXED_BYTES)} for this tensor with its inputs"),
        where=None if largest is None else f"tensor {largest.tensor.spec.name!r}",
        remedy=f"pass `options=MergeOptions(memory_bytes={-(-needed // 1_000_000)}_000_000)` or more",
    )


def _largest(plan: Plan) -> Window | None:
    return largest_window([tensor for shard in plan.shards for tensor in shard.tensors], mapped_models(plan.inputs))


def _first(tensor: OutputTensor, mapped: AbstractSet[str], max_bytes: int = WINDOW_BYTES) -> Iterator[Window]:
    for window in windows(tensor, max_bytes, mapped):
        yield window
        return


def _rounded(num_bytes: int) -> int:
    """Buffers are taken in size classes up to an eighth larger than asked."""
    return num_bytes + -(-num_bytes // 8)
