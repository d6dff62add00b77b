"""Rows of stored tensors, brought into the order in which a window has them.

Rows in local files are copied out of a mapping of them. From stores, long runs are read straight to their place; what
is scattered is read in spans that contain many rows and what lies between, each of which a thread copies its rows out
of: a request for each row would take longer than the bytes that nobody wants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.core.expressions import ZEROS, Gather, Load
from mergekit_ray.core.plan import InputModel
from mergekit_ray.evaluation.pieces import Bytes
from mergekit_ray.planning.windows import MIN_MAPPED_BYTES, SPAN_BYTES, SPANS_AT_ONCE
from mergekit_ray.storage.protocols import MappableSource, Source

if TYPE_CHECKING:
    from mergekit_ray.core.expressions.runs import Integers

_MIN_DIRECT_BYTES: Final = 1 << 18
"""Of a run that is read by a request of its own, whatever lies beside it."""

_MAX_GAP_BYTES: Final = 1 << 20
"""Between rows that are read together from a store: about what one connection brings while another request is on its
way."""

_MAX_LOCAL_GAP_BYTES: Final = 1 << 16
"""The same of a disk."""

_MIN_DENSITY: Final = 1 / 8
"""Part of a mapping that is used at least; of less, rows are read one by one."""

_BLOCK_BYTES: Final = 1 << 18
"""Copied at a time where rows go to places that are not side by side."""

_LOCK = threading.Lock()
_POOL: list[ThreadPoolExecutor] = []

Filling = Callable[[], int]
"""Fills rows of a buffer; says how many bytes it asked of stores."""


class RowReader:
    """Finds out how the rows of a shard's gathers are read. For one thread: the reader.

    Args:
        models: the plan's input models, by key.
        sources: an open source per model key.
        mappable: of these, the ones whose files are mapped.

    Attributes:
        checks: to be called once all that was read has been used, see `MappedRange`.
    """

    def __init__(
        self, models: Mapping[str, InputModel], sources: Mapping[str, Source], mappable: Mapping[str, MappableSource]
    ) -> None:
        self._models, self._sources, self._mappable = models, sources, mappable
        self._mapped: dict[tuple[Gather, int], tuple[Bytes, int] | None] = {}
        self.checks: list[Callable[[], None]] = []

    def prepare(self, gather: Gather, run: tuple[int, int], buffer: Bytes, ranges: list[ByteRange]) -> list[Filling]:
        """What fills a buffer with the rows that a run of elements lies in, beside the ranges that are added.

        Args:
            gather: whose rows.
            run: of its elements.
            buffer: exactly as long as these rows.
            ranges: what is read straight to its place.
        """
        first, last = gather.rows(*run)
        out = buffer.reshape(last - first, -1)
        part, row = gather.runs.rows(first, last)
        fillings: list[Filling] = []
        for index in np.unique(part).tolist():
            places = np.flatnonzero(part == index)
            if index == ZEROS:
                fillings.append(partial(_fill_zeros, out, places))
                continue
            found = self._mapping(gather, index)
            if found is not None:
                mapped, begin = found
                fillings.append(partial(_copy, mapped, row[places] - begin, out, places))
                continue
            load = gather.parts[index]
            is_direct = np.zeros(len(part), bool)
            for place, begin, count in _long_runs(gather.runs.within(first, last), index, out.shape[1]):
                ranges.append(self._range(load, begin, out[place : place + count]))
                is_direct[place : place + count] = True
            places = places[~is_direct[places]]
            if len(places):
                fillings.append(partial(self._read, load, row[places], out, places))
        return fillings

    def _range(self, load: Load, row: int, out: Bytes) -> ByteRange:
        """Rows from one on, as many as there is room for."""
        version = self._models[load.model].files[load.location.file].version
        start = load.location.start + row * out.shape[1]
        data = out.reshape(-1).data
        return ByteRange(load.model, load.location.file, start, start + data.nbytes, version, data)

    def _mapping(self, gather: Gather, index: int) -> tuple[Bytes, int] | None:
        """The rows of a part where they lie, ``[rows, bytes]``, from the first that is used; None to read them."""
        key = gather, index
        if key not in self._mapped:
            self._mapped[key] = self._map(gather, index)
        return self._mapped[key]

    def _map(self, gather: Gather, index: int) -> tuple[Bytes, int] | None:
        load = gather.parts[index]
        source = self._mappable.get(load.model)
        part, first, count = gather.runs.table.T
        of_part = part == index
        begin, end = int(first[of_part].min()), int((first + count)[of_part].max())
        width = gather.row_elements * gather.spec.dtype.itemsize
        used = int(count[of_part].sum())
        if source is None or (end - begin) * width < MIN_MAPPED_BYTES or used < _MIN_DENSITY * (end - begin):
            return None
        file, start = load.location.file, load.location.start
        version = self._models[load.model].files[file].version
        mapped = source.map_range(file, start + begin * width, start + end * width, version=version)
        self.checks.append(mapped.check)
        return np.frombuffer(mapped.data, np.uint8).reshape(-1, width), begin

    def _read(self, load: Load, rows: Integers, out: Bytes, places: Integers) -> int:
        order = np.argsort(rows, kind="stable")
        rows, places = rows[order], places[order]
        is_far = "://" in self._sources[load.model].uri
        gap = _MAX_GAP_BYTES if is_far else _MAX_LOCAL_GAP_BYTES
        tasks = [
            _pool().submit(self._read_span, load, rows[first:last], out, places[first:last])
            for first, last in _spans(rows, out.shape[1], gap)
        ]
        try:
            return sum(task.result() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            wait(tasks)  # nothing may write into the buffer after this returns

    def _read_span(self, load: Load, rows: Integers, out: Bytes, places: Integers) -> int:
        """Rows that lie near each other, ascending."""
        begin, end = int(rows[0]), int(rows[-1]) + 1
        place = int(places[0])
        if end - begin == len(rows) and (places == np.arange(place, place + len(rows))).all():
            return read_into(self._sources, [self._range(load, begin, out[place : place + len(rows)])])
        scratch = np.empty((end - begin, out.shape[1]), np.uint8)
        num_bytes = read_into(self._sources, [self._range(load, begin, scratch)])
        _copy(scratch, rows - begin, out, places)
        return num_bytes


def _long_runs(runs: Integers, index: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Those of a part that are read straight to their place: where that is, their first row, and how many."""
    part, first, count = runs.T
    places = np.cumsum(count) - count
    is_long = (part == index) & (count * width >= _MIN_DIRECT_BYTES)
    yield from zip(*(x[is_long].tolist() for x in (places, first, count)), strict=True)


def _spans(rows: Integers, width: int, max_gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ascending rows of so many bytes where the gap between two is large, and so that no span is long."""
    far = np.flatnonzero((rows[1:] - rows[:-1] - 1) * width > max_gap_bytes) + 1
    most = max(1, SPAN_BYTES // width)
    first = 0
    for last in (*far.tolist(), len(rows)):
        while first < last:
            stop = min(last, int(np.searchsorted(rows, rows[first] + most)))
            yield first, stop
            first = stop


def _copy(source: Bytes, rows: Integers, out: Bytes, places: Integers) -> int:
    """Rows of one array to places of another."""
    begin, end = int(places[0]), int(places[-1]) + 1
    if end - begin == len(places) and (np.diff(places) == 1).all():
        # Rows are all there; to see to it that they are, numpy would make another copy.
        np.take(source, rows, axis=0, out=out[begin:end], mode="clip")
        return 0
    step = max(1, _BLOCK_BYTES // out.shape[1])
    for first in range(0, len(rows), step):
        out[places[first : first + step]] = source.take(rows[first : first + step], axis=0)
    return 0


def _fill_zeros(out: Bytes, places: Integers) -> int:
    out[places] = 0
    return 0


def _pool() -> ThreadPoolExecutor:
    """The threads of this process that read spans; started when first needed."""
    with _LOCK:
        if not _POOL:
            _POOL.append(ThreadPoolExecutor(SPANS_AT_ONCE, thread_name_prefix="rows"))
        return _POOL[0]
