"""One file being written to a folder: a temporary name, then a rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from mergekit_ray.core.errors import MergekitRayError, PlanError, StorageError
from mergekit_ray.storage.faults import discarded, full, wrong_size
from mergekit_ray.storage.local.direct_io import AppendingFile
from mergekit_ray.storage.local.file_system import is_in_memory
from mergekit_ray.storage.protocols import FileStat

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.nfs[0-9a-f]{16,}")
"""Also what an NFS client calls a file that is removed while a process there has it open."""

_RANDOM_LENGTH = len("0123456789abcdef.tmp")
_NO_FALLOCATE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV}
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NUM_CREATE_ATTEMPTS = 20


def is_temporary(file_name: str) -> bool:
    """Whether a file of this name is one being written, or what is left of one."""
    return _TEMPORARY.fullmatch(file_name) is not None


def temporary_for(path: Path) -> Path:
    """A name that nobody has, beside ``path``, for what is to become it."""
    return path.parent / f"{_temporary_prefix(path)}{secrets.token_hex(8)}.tmp"


def temporaries_of(paths: Iterable[Path]) -> list[Path]:
    """What is there under such names; each folder is listed once."""
    prefixes: dict[Path, set[str]] = {}
    for path in paths:
        prefixes.setdefault(path.parent, set()).add(_temporary_prefix(path))
    found = []
    for folder, wanted in prefixes.items():
        with contextlib.suppress(OSError):
            found += [
                folder / name
                for name in os.listdir(folder)  # noqa: PTH208 - of thousands of files
                if is_temporary(name) and name[:-_RANDOM_LENGTH] in wanted
            ]
    return found


def _temporary_prefix(path: Path) -> str:
    # File names end at 255 bytes; what is added to the name takes 22.
    return f".{path.name.encode()[:200].decode(errors='ignore')}."


def local_fault(error: OSError, path: Path, num_bytes: int | None = None) -> MergekitRayError:
    """What an operating system error means, with what to do. ``num_bytes`` is what was to be written."""
    what = error.strerror or str(error)
    if error.errno == errno.ENAMETOOLONG:
        return PlanError(
            "the name is longer than the file system takes", where=str(path), remedy="choose a shorter one"
        )
    if error.errno in _FULL:
        free = _free_bytes(path)
        if num_bytes is not None and free is not None:
            what = f"no space left: {num_bytes} bytes are needed, {free} are free"
        return full(what, str(path))
    if error.errno in _DENIED:
        return StorageError(
            what, where=str(path), remedy="check the permissions of the folder, and that it is not mounted read-only"
        )
    return StorageError(what, where=str(path), remedy="check the disk or mount, and run again to resume")


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


class LocalUpload:
    """See `mergekit_ray.storage.protocols.Upload`.

    The temporary file is locked while it is written. A killed process leaves one that is not locked; it is removed when
    the same file is next opened for writing.

    Args:
        root: of the store.
        path, name: of the file; relative to the root.
        num_bytes: that will be written.
        version: of a file, from its name and status.
        guard: see `GuardedSink.guarded`.
    """

    def __init__(
        self,
        root: Path,
        path: Path,
        name: str,
        num_bytes: int,
        version: Callable[[str, os.stat_result], str],
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._guard = guard
        self._root = root
        self._path = path
        self._name = name
        self._num_bytes = num_bytes
        self._version = version
        self._num_written = 0
        self._fd: int | None = None
        self._file: AppendingFile | None = None
        self._temporary: Path | None = None
        try:
            self._remove_stale()
            self._create()
            self._reserve()
            assert self._fd is not None
            self._file = AppendingFile(self._fd, num_bytes)
        except OSError as error:
            self.abort()
            raise local_fault(error, path, num_bytes) from error

    def write(self, data: memoryview | bytes) -> None:
        """See `Upload.write`."""
        if self._fd is None or self._file is None:
            raise ValueError(f"{self._path} is already committed or aborted")
        view = memoryview(data).cast("B")
        if self._num_written + len(view) > self._num_bytes:
            raise wrong_size(self._num_written + len(view), self._num_bytes, str(self._path))
        try:
            self._file.write(view)
            self._num_written += len(view)
        except OSError as error:
            raise local_fault(error, self._path, self._num_bytes) from error

    def commit(self) -> FileStat:
        """See `Upload.commit`."""
        temporary = self._complete()
        self._guard()
        try:
            temporary.replace(self._path)
            self._temporary = None
            return self._close()
        except FileNotFoundError as error:
            raise discarded(str(self._path)) from error
        except OSError as error:
            raise local_fault(error, self._path, self._num_bytes) from error

    def commit_if_absent(self) -> bool:
        """Commit unless the file exists; whether it was committed. Call `abort` afterwards in any case.

        Raises:
            FileNotFoundError: somebody took the temporary file for that of a killed process. Begin again.
        """
        temporary = self._complete()
        assert self._fd is not None
        with contextlib.suppress(OSError):
            # Both names are one file: a process that is stopped here must not keep the new one locked.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        try:
            try:
                os.link(temporary, self._path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                if not _create(self._path, temporary.read_bytes()):
                    return False
            sync_folder(self._path.parent)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise local_fault(error, self._path, self._num_bytes) from error
        return True

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._file is not None:
            self._file.discard()
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                os.close(fd)
        if temporary is not None:
            prune_empty_folders(self._path.parent, self._root)  # FUSE and NFS hide a file in it while that is open

    def _remove_stale(self) -> None:
        for entry in temporaries_of([self._path]):
            # Should it be so new that its writer has not locked it yet, the writer notices and takes another (`_hold`).
            with contextlib.suppress(OSError), entry.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()

    def _create(self) -> None:
        for attempt in range(_NUM_CREATE_ATTEMPTS):
            temporary = temporary_for(self._path)
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                # Whoever deleted the last file of this folder has just removed it.
                if attempt == _NUM_CREATE_ATTEMPTS - 1:
                    raise
            else:
                if _hold(fd):
                    self._fd, self._temporary = fd, temporary
                    return
                os.close(fd)
        raise OSError(errno.EBUSY, "others keep removing the files that are to be written")

    def _reserve(self) -> None:
        if self._fd is None or not self._num_bytes or not hasattr(os, "posix_fallocate"):
            return
        if is_in_memory(self._fd):
            # There nothing is scattered over a disk, and to reserve takes as long as to write.
            if shutil.disk_usage(self._fd).free < self._num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        try:
            os.posix_fallocate(self._fd, 0, self._num_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise

    def _complete(self) -> Path:
        if self._fd is None or self._temporary is None:
            raise ValueError(f"{self._path} is already committed or aborted")
        if self._num_written != self._num_bytes:
            raise wrong_size(self._num_written, self._num_bytes, str(self._path))
        try:
            if self._file is not None:
                self._file.finish()
            os.fsync(self._fd)
        except OSError as error:
            raise local_fault(error, self._path, self._num_bytes) from error
        return self._temporary

    def _close(self) -> FileStat:
        assert self._fd is not None
        status = os.fstat(self._fd)
        fd, self._fd = self._fd, None
        os.close(fd)
        sync_folder(self._path.parent)
        return FileStat(self._name, status.st_size, self._version(self._name, status))


def _create(path: Path, data: bytes) -> bool:
    """Write a file where there is none; whether there was none. It may be seen before it is complete."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise
    return True


def _hold(fd: int) -> bool:
    """Lock a new temporary file. False if somebody took it for that of a killed process and removes it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: nobody removes anything
        return True
    return os.fstat(fd).st_nlink > 0


def prune_empty_folders(folder: Path, root: Path) -> None:
    """Remove ``folder`` and its parents below ``root`` as long as they are empty."""
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be synced."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
