"""A folder that something happens to while shards are written there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import FileStat, Upload


class HookedStore(LocalStore):
    """A store that calls functions first.

    Args:
        root: the folder.
        on_open: called before a file is begun.
        on_write: before bytes are written to one.
        on_commit: before one is committed.
    """

    def __init__(
        self,
        root: Path,
        *,
        on_open: Callable[[], object] = lambda: None,
        on_write: Callable[[], object] = lambda: None,
        on_commit: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(root)
        self._on_open, self._on_write, self._on_commit = on_open, on_write, on_commit

    def open(self, name: str, num_bytes: int) -> Upload:
        """See `Sink.open`."""
        self._on_open()
        return _HookedUpload(super().open(name, num_bytes), self._on_write, self._on_commit)


class _HookedUpload:
    def __init__(self, upload: Upload, on_write: Callable[[], object], on_commit: Callable[[], object]) -> None:
        self._upload, self._on_write, self._on_commit = upload, on_write, on_commit

    def write(self, data: memoryview | bytes) -> None:
        self._on_write()
        self._upload.write(data)

    def commit(self) -> FileStat:
        self._on_commit()
        return self._upload.commit()

    def abort(self) -> None:
        self._upload.abort()
