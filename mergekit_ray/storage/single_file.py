"""A single file as a store: what a recipe names with ``./unet.safetensors`` or ``s3://bucket/unet.safetensors``."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

from mergekit_ray.storage.names import check_name, file_name
from mergekit_ray.storage.protocols import FileStat, MappableSource, MappedRange, Source, WritableBuffer


class SingleFile:
    """One file of another store, alone: what lies beside it is not listed.

    Args:
        store: that holds the file.
        place: the file's name in that store.
        uri: of the file.

    Attributes:
        name: what the file is called here.
    """

    def __init__(self, store: Source, place: str, uri: str) -> None:
        check_name(place, store.uri)
        self._store, self._place, self._uri = store, place, uri
        self.name = file_name(uri)

    @property
    def uri(self) -> str:
        """That of the file."""
        return self._uri

    def list(self) -> builtins.list[FileStat]:
        """See `Source.list`: the file, or nothing if there is none."""
        stat = self.stat(self.name)
        return [] if stat is None else [stat]

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        stat = self._store.stat(self._place) if name == self.name else None
        return None if stat is None else self._named(stat)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return self._store.read(self._inner(name), max_bytes=max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        data, stat = self._store.read_head(self._inner(name), num_bytes)
        return data, self._named(stat)

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""
        return self._store.read_ranges(self._inner(name), ranges, buffers, version=version)

    def _inner(self, name: str) -> str:
        """The name in the store that holds the file; of another file a name that the store does not find."""
        return self._place if name == self.name else f"{self._place}/{name}"

    def _named(self, stat: FileStat) -> FileStat:
        return FileStat(self.name, stat.num_bytes, stat.version)


class MappedSingleFile(SingleFile):
    """The same of a store whose files can be mapped."""

    def map_range(self, name: str, start: int, end: int, *, version: str | None = None) -> MappedRange:
        """See `MappableSource.map_range`."""
        assert isinstance(self._store, MappableSource)
        return self._store.map_range(self._inner(name), start, end, version=version)


def file_uri(source: Source, name: str) -> str:
    """Path or URI of a file, for messages."""
    return source.uri if isinstance(source, SingleFile) else f"{source.uri}/{name}"


def single_file(store: Source, place: str, uri: str) -> SingleFile:
    """A file of a store as a store of its own. See `SingleFile`."""
    return (MappedSingleFile if isinstance(store, MappableSource) else SingleFile)(store, place, uri)
