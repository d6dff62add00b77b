"""Files that are nowhere but in memory, for tests that read headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ray.storage.protocols import FileStat, WritableBuffer


class MemorySource:
    """A `Source` over a mapping.

    Args:
        uri: what it calls itself.
        files: content by name.
    """

    def __init__(self, uri: str, files: Mapping[str, bytes]) -> None:
        self._uri = uri
        self._files = dict(files)

    @property
    def uri(self) -> str:
        """See `Source.uri`."""
        return self._uri

    def list(self) -> list[FileStat]:
        """See `Source.list`."""
        return [self._stat(name) for name in sorted(self._files)]

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        return self._stat(name) if name in self._files else None

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        assert len(self._files[name]) <= max_bytes
        return self._files[name]

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        return self._files[name][:num_bytes], self._stat(name)

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""
        assert version in (None, self._stat(name).version)
        for (start, end), buffer in zip(ranges, buffers, strict=True):
            buffer[:] = self._files[name][start:end]
        return sum(end - start for start, end in ranges)

    def _stat(self, name: str) -> FileStat:
        return FileStat(name, len(self._files[name]), f"{len(self._files[name])}-1")
