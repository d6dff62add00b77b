"""Which requests fetch a set of byte ranges: close ones as one, big ones in parts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mergekit_ray.storage.protocols import WritableBuffer


@dataclass(slots=True)
class Fetch:
    """One request, and how far its answer has been stored.

    Attributes:
        start, end: bytes of the file, end exclusive.
        pieces: where they go: (first byte in the file, destination), ascending, disjoint. What lies between is dropped.
        position: next byte of the file wanted; ``start`` at first, ``end`` when done. A retry goes on from here.
    """

    start: int
    end: int
    pieces: list[tuple[int, WritableBuffer]]
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.start

    def remaining(self) -> Iterator[tuple[int, WritableBuffer]]:
        """Pieces that still miss bytes, each cut to what it misses: (bytes to skip before it, destination)."""
        for start, buffer in self.pieces:
            end = start + len(buffer)
            if end > self.position:
                first = max(start, self.position)
                yield first - self.position, buffer[first - start :]


def sorted_ranges(
    ranges: Sequence[tuple[int, int]], buffers: Sequence[WritableBuffer]
) -> list[tuple[int, int, WritableBuffer]]:
    """(start, end, buffer) of the ranges that are not empty, ascending.

    Raises:
        ValueError: a range is reversed or negative, or a buffer is not as long as its range.
    """
    if len(ranges) != len(buffers):
        raise ValueError(f"{len(ranges)} ranges but {len(buffers)} buffers")
    wanted = []
    for (start, end), buffer in zip(ranges, buffers, strict=True):
        if start < 0 or end < start:
            raise ValueError(f"not a byte range: {start}..{end}")
        if buffer.nbytes != end - start:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes for a range of {end - start}")
        if end > start:
            wanted.append((start, end, buffer))
    wanted.sort(key=lambda item: item[:2])
    return wanted


def plan_fetches(
    ranges: Sequence[tuple[int, int]],
    buffers: Sequence[WritableBuffer],
    *,
    max_gap_bytes: int,
    part_bytes: int,
) -> list[Fetch]:
    """The requests that fill ``buffers``.

    Ranges at most ``max_gap_bytes`` apart share a request; a request longer than ``part_bytes`` is cut into equal parts
    no longer than that. Ranges that overlap are fetched separately.

    Raises:
        ValueError: see `sorted_ranges`.
    """
    spans: list[Fetch] = []
    for start, end, buffer in sorted_ranges(ranges, buffers):
        if spans and spans[-1].end <= start <= spans[-1].end + max_gap_bytes:
            spans[-1].pieces.append((start, buffer))
            spans[-1].end = end
        else:
            spans.append(Fetch(start, end, [(start, buffer)]))
    return [part for span in spans for part in _parts(span, part_bytes)]


def _parts(span: Fetch, part_bytes: int) -> Iterator[Fetch]:
    num_bytes = span.end - span.start
    if num_bytes <= part_bytes:
        yield span
        return
    size = -(-num_bytes // -(-num_bytes // part_bytes))
    pieces = iter(span.pieces)
    piece = next(pieces, None)
    for start in range(span.start, span.end, size):
        end = min(start + size, span.end)
        inside = []
        while piece is not None and piece[0] < end:
            first, buffer = piece
            lo, hi = max(first, start), min(first + len(buffer), end)
            inside.append((lo, buffer[lo - first : hi - first]))
            if first + len(buffer) > end:
                break  # its rest belongs to the next part
            piece = next(pieces, None)
        if inside:
            # Bytes before the first and after the last piece belong to nobody.
            yield Fetch(inside[0][0], inside[-1][0] + len(inside[-1][1]), inside)
