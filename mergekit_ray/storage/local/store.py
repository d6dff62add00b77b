"""Folders on this machine, or on a file system that all nodes mount."""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, urlsplit

from mergekit_ray.core.errors import CheckpointError, MergekitRayError, ModelError
from mergekit_ray.storage.faults import changed, missing
from mergekit_ray.storage.fence import LEASE_FILE, WORK_FOLDER, allow_all
from mergekit_ray.storage.local.changes import NOT_THERE, delete_files, discard, lock, move_files
from mergekit_ray.storage.local.fault_guard import Fault
from mergekit_ray.storage.local.file_system import refresh
from mergekit_ray.storage.local.links import (
    check_folder,
    check_link,
    check_links,
    check_written,
    file_status,
    leads_nowhere,
)
from mergekit_ray.storage.local.mapped import map_file
from mergekit_ray.storage.local.ranges import read_sorted
from mergekit_ray.storage.local.upload import LocalUpload, is_temporary, local_fault
from mergekit_ray.storage.names import check_name, check_text
from mergekit_ray.storage.protocols import FileStat, MappedRange, WritableBuffer
from mergekit_ray.storage.ranges import sorted_ranges
from mergekit_ray.storage.schemes import SCHEMES
from mergekit_ray.storage.transfers import read_whole, write_whole

MAX_OPEN_FILES = 128


class _OpenFile:
    """A file descriptor that is closed when the last thread that uses it lets go."""

    __slots__ = ("fd", "identity")

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.fd)
        self.identity = (status.st_dev, status.st_ino)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


class LocalSource:
    """A folder that is read.

    A file's version is its size and modification time, so that copies made with their times kept (``rsync -t``) on
    several nodes have one version. Recently used files stay open. Symbolic links are followed as `storage.local.links`
    says; a file behind another is a CheckpointError.
    """

    def __init__(self, root: str | Path) -> None:
        # resolve() would follow symbolic links, and Path.expanduser() fails where there is no such user.
        self._root = Path(os.path.abspath(os.path.expanduser(root)))  # noqa: PTH100, PTH111
        self._open_files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """The absolute path."""
        return str(self._root)

    def close(self) -> None:
        """Close the files kept open. The store can still be used."""
        with self._lock:
            self._open_files.clear()

    def list(self) -> builtins.list[FileStat]:
        """See `Source.list`. Files being written are not listed; symbolic links to files are, wherever they lead."""
        found = [
            FileStat(name, status.st_size, self._version(name, status)) for name, status in self._walk(self._root, "")
        ]
        return sorted(found, key=lambda file: file.name)

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        path = self._path(name)
        refresh(self._root, path.parent)
        try:
            status = path.stat()
        except OSError as error:
            if _is_absent(error) or error.errno == errno.ELOOP:
                return None
            raise local_fault(error, path) from error
        if not _is_file(status):
            return None
        check_link(self._root, self._path(name))
        return FileStat(name, status.st_size, self._version(name, status))

    def check_links(self, is_wanted: Callable[[str], bool]) -> None:
        """See `LinkedSource.check_links`."""
        check_links(self._root, is_wanted)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return read_whole(self, name, max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`. The file is opened anew, and not kept open."""
        file, status = self._open_anew(name)
        data = self._read_prefix(name, file, min(num_bytes, status.st_size))
        return data, FileStat(name, status.st_size, self._version(name, status))

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`. Ranges that touch are read by one call; the version is checked before and after."""
        wanted = sorted_ranges(ranges, buffers)
        file, before = self._open(name)
        if version is not None and self._version(name, before) != version:
            raise changed(str(self._path(name)))
        for _, end, _ in wanted:
            if end > before.st_size:
                raise self._cut_short(name, before, end)
        try:
            read_sorted(file.fd, wanted)
            after = os.fstat(file.fd)
        except EOFError:
            raise changed(str(self._path(name))) from None
        except OSError as error:
            raise local_fault(error, self._path(name)) from error
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise changed(str(self._path(name)))
        return sum(end - start for start, end, _ in wanted)

    def map_range(self, name: str, start: int, end: int, *, version: str | None = None) -> MappedRange:
        """See `MappableSource.map_range`."""
        file, status = self._open(name)
        if version is not None and self._version(name, status) != version:
            raise changed(str(self._path(name)))
        if end > status.st_size:
            raise self._cut_short(name, status, end)
        try:
            data, fault = map_file(file.fd, start, end)
        except OSError as error:
            self._check_unchanged(name, file, status)
            raise local_fault(error, self._path(name)) from error
        return MappedRange(data, functools.partial(self._check_mapped, name, file, status, fault))

    def _check_mapped(self, name: str, file: _OpenFile, mapped: os.stat_result, fault: Fault) -> None:
        self._check_unchanged(name, file, mapped)
        if fault.happened:
            raise local_fault(OSError(errno.EIO, os.strerror(errno.EIO)), self._path(name))

    def _check_unchanged(self, name: str, file: _OpenFile, before: os.stat_result) -> None:
        """Check that an open file is what it was, and that it is still what its name stands for."""
        after, there = os.fstat(file.fd), self.stat(name)
        same = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not same or there is None or there.version != self._version(name, before):
            raise changed(str(self._path(name)))

    def _path(self, name: str) -> Path:
        check_name(name, str(self._root))
        return self._root / name

    def _version(self, name: str, status: os.stat_result) -> str:
        del name
        return f"{status.st_size}-{status.st_mtime_ns}"

    def _cut_short(self, name: str, status: os.stat_result, end: int) -> CheckpointError:
        return CheckpointError(
            f"has {status.st_size} bytes, but byte {end - 1} is asked for",
            where=str(self._path(name)),
            remedy="the file is cut short: download or copy it again",
        )

    def _open_anew(self, name: str) -> tuple[_OpenFile, os.stat_result]:
        """A file as it is now. What is kept open may be what another machine has replaced, and NFS would not say so."""
        path = self._path(name)
        refresh(self._root, path.parent)
        try:
            if not _is_file(path.stat()):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            check_link(self._root, path)
            file = _OpenFile(path)
            return file, os.fstat(file.fd)
        except OSError as error:
            raise _unopened(error, path) from error

    def _open(self, name: str) -> tuple[_OpenFile, os.stat_result]:
        """The open file that is now at ``name``, and its status."""
        path = self._path(name)
        try:
            status = path.stat()
            if not _is_file(status):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with self._lock:
                file = self._open_files.get(name)
                if file is None or file.identity != (status.st_dev, status.st_ino):
                    check_link(self._root, path)
                    file = self._open_files[name] = _OpenFile(path)
                    status = os.fstat(file.fd)
                self._open_files.move_to_end(name)
                if len(self._open_files) > MAX_OPEN_FILES:
                    self._open_files.popitem(last=False)
        except OSError as error:
            raise _unopened(error, path) from error
        return file, status

    def _read_prefix(self, name: str, file: _OpenFile, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        try:
            read_sorted(file.fd, [(0, num_bytes, memoryview(data))] if num_bytes else [])
        except EOFError:
            raise changed(str(self._path(name))) from None
        except OSError as error:
            raise local_fault(error, self._path(name)) from error
        return bytes(data)

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        refresh(self._root, folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_temporary(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
                    elif (status := file_status(entry)) is not None:
                        yield prefix + entry.name, status
        except OSError as error:
            if not _is_absent(error):
                raise local_fault(error, folder) from error


class LocalStore(LocalSource):
    """A folder that is read and written.

    A file is written under a temporary name in its folder, synced, and renamed. ``put_if_absent`` links the finished
    file to its name, which one of several racers can do; a file system without hard links gets an exclusive create
    instead, where a reader may see the file before it is complete. ``replace`` locks the file (flock); on a file system
    without locks, two racers that look at the same moment may both succeed.

    A link in the place of a file is replaced. All changes raise PlanError where a folder below the root is a link, and
    below the output's root, should this be a folder for work in it.

    As a `GuardedSink` it keeps the whole promise, on every file system that has hard links: what is prepared is a
    temporary file, a link or a folder, and each commit is a rename that needs it to be there.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self._guard: Callable[[], None] = allow_all
        parts = self._root.parts
        self._output = Path(*parts[: parts.index(WORK_FOLDER)]) if WORK_FOLDER in parts else self._root

    def guarded(self, guard: Callable[[], None]) -> LocalStore:
        """See `GuardedSink.guarded`."""
        store = copy.copy(self)
        store._guard = guard  # noqa: SLF001 - of this class
        return store

    def discard_remains(self, names: Collection[str] | None = None) -> int:
        """See `RemainsSink.discard_remains`."""
        for name in names or ():
            self._target(name)
        return discard(self._root, names, self._path(LEASE_FILE))

    def open(self, name: str, num_bytes: int) -> LocalUpload:
        """See `Sink.open`. The space is reserved at once.

        Raises:
            StorageError: the disk is full or read-only; names needed and free bytes.
        """
        return LocalUpload(self._root, self._target(name), name, num_bytes, self._version, self._guard)

    def put(self, name: str, data: bytes) -> FileStat:
        """See `Sink.put`."""
        return write_whole(self, name, data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Sink.put_if_absent`."""
        self._target(name, itself=True)
        while True:
            upload = self.open(name, len(data))
            try:
                upload.write(data)
                return upload.commit_if_absent()
            except FileNotFoundError:  # a racer took it for that of a killed process
                continue
            finally:
                upload.abort()

    def replace(self, name: str, data: bytes, *, version: str) -> FileStat | None:
        """See `ConditionalSink.replace`."""
        path = self._target(name, itself=True)
        refresh(self._root, path.parent)
        try:
            with path.open("rb+") as file:
                lock(path, file.fileno())
                # Whoever was faster has put another file in its place.
                refresh(self._root, path.parent)
                held, there = os.fstat(file.fileno()), path.stat()
                if not os.path.samestat(held, there) or self._version(name, there) != version:
                    return None
                return self.put(name, data)
        except NOT_THERE:
            return None
        except OSError as error:
            raise local_fault(error, path) from error

    def move(self, names: Mapping[str, str]) -> None:
        """See `MovingSink.move`: a rename each."""
        move_files({self._target(old): self._target(new) for old, new in names.items()}, self._root, self._guard)

    def delete(self, names: Sequence[str]) -> None:
        """See `Sink.delete`."""
        delete_files([self._target(name) for name in names], self._root, self._guard)

    def _target(self, name: str, *, itself: bool = False) -> Path:
        """The path of a file that is to be changed; see `check_written`."""
        path = self._path(name)
        check_written(self._output, path, itself=itself)
        return path


def _is_absent(error: OSError) -> bool:
    """Whether there is no such file, perhaps because its name is too long for the file system."""
    return isinstance(error, NOT_THERE) or error.errno == errno.ENAMETOOLONG


def _unopened(error: OSError, path: Path) -> MergekitRayError:
    """Why a file could not be opened."""
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114 - False also of what cannot be read
        return leads_nowhere(path)
    return missing(str(path)) if _is_absent(error) else local_fault(error, path)


def _is_file(status: os.stat_result) -> bool:
    return S_ISREG(status.st_mode)


@SCHEMES.register("file")
def open_folder(uri: str, revision: str | None) -> LocalStore:
    """The store at a path or a ``file://`` URI.

    Raises:
        ModelError: a revision is given, the URI names another host, or the path leads to or through a file.
        StorageError: the path goes by a link that leads nowhere.
    """
    path = uri
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise ModelError("a file URI cannot name another host", where=uri, remedy="write file:///absolute/path")
        path = unquote(parts.path, errors="surrogateescape")
    check_text(path)
    if not path:
        raise ModelError("an empty path", where=repr(uri), remedy="give a folder")
    if revision is not None:
        raise ModelError(
            f"a folder has no revision {revision!r}",
            where=uri,
            remedy="leave out what follows the '@', or name a Hub repository",
        )
    check_folder(Path(path).expanduser())
    store = LocalStore(path)
    root = Path(store.uri)
    there = next(place for place in (root, *root.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ModelError("a file, where a folder is needed", where=str(there), remedy="name a folder")
    return store
