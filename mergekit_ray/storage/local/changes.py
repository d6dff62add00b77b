"""Changes to the files of a folder that a guard may still prevent, renames and removals; and locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from mergekit_ray.core.errors import StorageError
from mergekit_ray.storage.faults import discarded, missing
from mergekit_ray.storage.local.file_system import refresh
from mergekit_ray.storage.local.upload import (
    NO_LINKS,
    is_temporary,
    local_fault,
    prune_empty_folders,
    sync_folder,
    temporaries_of,
    temporary_for,
)

LOCK_SECONDS = 10.0
"""For which `lock` waits."""

_LOCK_POLL_SECONDS = 0.05
_MAX_REMOVALS = 100
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def move_files(paths: Mapping[Path, Path], root: Path, guard: Callable[[], None]) -> None:
    """Rename files; see `MovingSink.move`.

    A second link to each is made beside its new name, and after ``guard`` takes it, so that whoever removes those links
    prevents the renames. Where a file system has no links, the files are renamed themselves, and nothing prevents it.

    Raises:
        CheckpointError, StorageError: see `MovingSink.move`; or what was prepared is gone.
    """
    prepared: dict[Path, Path] = {}
    try:
        for old, new in paths.items():
            prepared[old] = _prepare(old, new)
        guard()
        for old, new in paths.items():
            _commit(prepared[old], new)
        for folder in {new.parent for new in paths.values()}:
            sync_folder(folder)
        for old in paths.keys() - set(paths.values()):
            _unlink(old)
            prune_empty_folders(old.parent, root)
    finally:
        # Also what is left of renames between two links of one file, which do nothing.
        for old, link in prepared.items():
            if link != old:
                _unlink(link)


def _prepare(old: Path, new: Path) -> Path:
    """A second link to a file beside its new name; the file itself where there are no links."""
    link = temporary_for(new)
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        os.link(old, link, follow_symlinks=False)
    except NOT_THERE as error:
        raise missing(str(old)) from error
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise local_fault(error, new) from error
        return old
    return link


def _commit(prepared: Path, new: Path) -> None:
    try:
        prepared.replace(new)
    except FileNotFoundError as error:
        raise discarded(str(new)) from error
    except OSError as error:
        raise local_fault(error, new) from error


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def delete_files(paths: Collection[Path], root: Path, guard: Callable[[], None]) -> None:
    """Remove the files that exist: after ``guard`` they are moved to a folder that others may remove before.

    Raises:
        StorageError: the file system failed, or that folder is gone.
    """
    there = [path for path in paths if os.path.lexists(path)]
    if not there:
        return
    waste = temporary_for(root / "deleted")
    try:
        waste.mkdir()
        guard()
        for number, path in enumerate(there):
            _throw_away(path, waste / str(number))
    except OSError as error:
        raise local_fault(error, root) from error
    finally:
        shutil.rmtree(waste, ignore_errors=True)
    for path in there:
        prune_empty_folders(path.parent, root)


def _throw_away(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except NOT_THERE as error:
        if not target.parent.is_dir():
            raise discarded(str(path)) from error
    except OSError as error:
        raise local_fault(error, path) from error


def discard(root: Path, names: Collection[str] | None, kept: Path) -> int:
    """Remove what was prepared in a folder; see `RemainsSink.discard_remains`.

    Args:
        root: the folder.
        names: of the files that it was to become; None for all in the root and in folders named with a dot.
        kept: what was prepared for this file stays.
    """
    found = _prepared(root) if names is None else _prepared_for(root, names)
    spared = set(temporaries_of([kept]))
    count = 0
    for path in found:
        if path in spared:
            continue
        count += 1
        if path.is_dir():
            _remove_folder(path)
        else:
            _unlink(path)
    return count


def _prepared_for(root: Path, names: Iterable[str]) -> list[Path]:
    paths = [root / name for name in names]
    for folder in {path.parent for path in paths}:
        refresh(root, folder)
    return temporaries_of(paths)


def _remove_folder(path: Path) -> None:
    """Remove a folder into which somebody may be moving files."""
    with contextlib.suppress(FileNotFoundError):
        path = path.rename(temporary_for(path))  # whoever looks it up finds it no more
    for _ in range(_MAX_REMOVALS):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
    raise StorageError(
        "cannot be removed", where=str(path), remedy="remove it yourself, and see that nothing else writes there"
    )


def _prepared(root: Path, folder: Path | None = None) -> Iterator[Path]:
    """What is prepared in the root and in folders named with a dot; ``folder`` is one of them, or below one."""
    refresh(root, folder or root)
    with contextlib.suppress(OSError):
        for entry in sorted((folder or root).iterdir()):
            if is_temporary(entry.name):
                yield entry
            elif (folder or entry.name.startswith(".")) and entry.is_dir() and not entry.is_symlink():
                yield from _prepared(root, entry)


def lock(path: Path, fd: int) -> None:
    """Lock a file, where files can be locked.

    Raises:
        StorageError: another has locked it for so long that it must have been stopped.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"locked for {LOCK_SECONDS:.0f} s by a process that seems to be stopped",
                    where=str(path),
                    remedy="`fuser` or `lslocks` says which: let it go on, or end it",
                    retryable=False,
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:  # no locks on this file system
            return
        else:
            return
