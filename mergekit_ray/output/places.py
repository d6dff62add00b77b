"""Whether an output and the inputs keep out of each other's way, by whatever paths they are named.

Folders are compared by what they are (device and inode), so that links and bind mounts do not hide that two paths are
one place, and so are their files. Prefixes of buckets and repositories are compared by name, whatever the commit:
within a process, all buckets are on one endpoint. We cannot see that a bucket has two names (an access point),
that a repository was renamed, or that a file system is mounted twice with other inodes.

An output in an input's folder is refused. The reverse is not: models lie below a bucket's root, or in a folder of
models, whose root takes another. Of what is below it, a merge touches ``.mergekit-ray/`` and files that it writes
itself; inputs there are refused.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from mergekit_ray.core.errors import PlanError
from mergekit_ray.storage.fence import WORK_FOLDER
from mergekit_ray.storage.names import repository_of

_Identity: TypeAlias = tuple[int, int]
"""Device and inode."""


def check_apart(inputs: Mapping[str, Collection[str]], output: str, written: Collection[str] = ()) -> None:
    """Check that what is done at an output does not touch an input.

    Args:
        inputs: names of the files that are read, by the URI of the model.
        output: URI.
        written: names of files that are written or replaced there, beside those of folders for work (`WORK_FOLDER`).

    Raises:
        PlanError: the output is an input or in one, holds a file of one, or an input is where the output's files go.
    """
    for uri, files in inputs.items():
        place = (_cached(uri) if _is_folder(output) else None) or uri
        inside = below(output, place)
        if inside is not None:
            what = "the output is one of the inputs" if inside == "" else "the output is inside one of the inputs"
            raise PlanError(
                what if uri == output else f"{what}, {uri}",
                where=output,
                remedy="write to another folder, prefix or repository, beside the inputs"
                + ("; or name the commit that is read, org/name@commit" if output.startswith("hf://") else ""),
            )
        under = below(place, output)
        is_touched = under is not None and any(n == under or n.startswith(f"{under}/") for n in written)
        # A single file right in the output would go with whatever the result replaces.
        if under is not None and (under.startswith(WORK_FOLDER) or is_touched or under in files):
            raise PlanError(
                f"an input is where the output's files would go: {uri}",
                where=output,
                remedy="write to another folder or prefix, or move the input",
            )
        _check_files(place, files, output)


def _check_files(place: str, files: Collection[str], output: str) -> None:
    """Check that no file in the output's root is one of an input's, by a hard link or a mount."""
    if not (_is_folder(place) and _is_folder(output)):
        return
    is_file = Path(place).is_file()
    ours = {_identity(Path(place) if is_file else Path(place, name)): name for name in files}
    ours.pop(None, None)
    for path in _files(Path(output)) if ours else ():
        name = ours.get(_identity(path))
        if name is not None:
            raise PlanError(
                "this file of the output's folder is an input"
                if is_file
                else f"this file of the output is an input's file, {place}/{name}, by another name",
                where=str(path),
                remedy="write to another folder" + ("" if is_file else ", or remove the link"),
            )


def below(inner: str, outer: str) -> str | None:
    """The path of a folder or prefix relative to another that holds it; empty if they are one, None if it does not."""
    if _is_folder(inner) and _is_folder(outer):
        wanted, resolved = _identity(Path(outer)), Path(os.path.realpath(inner))
        for folder in (resolved, *resolved.parents):
            if folder == Path(os.path.realpath(outer)) or (wanted is not None and _identity(folder) == wanted):
                return "" if folder == resolved else resolved.relative_to(folder).as_posix()
        return None
    inner, outer = _bare(inner), _bare(outer)
    return inner.removeprefix(outer).strip("/") if f"{inner}/".startswith(f"{outer}/") else None


def _bare(uri: str) -> str:
    """A URI without its last slash; of the Hub a repository, without commit and case, which do not tell two apart."""
    return f"hf://{repository_of(uri)}".lower() if uri.startswith("hf://") else uri.rstrip("/")


def _is_folder(uri: str) -> bool:
    return uri.startswith("/")


def _cached(uri: str) -> str | None:
    """The folder of a Hub repository's commit in this machine's cache; None if it is not there, or no such commit."""
    if not uri.startswith("hf://"):
        return None
    from mergekit_ray.storage.hub.cache import cached_snapshot  # noqa: PLC0415 - see there

    folder = cached_snapshot(repository_of(uri), uri.partition("@")[2] or None)
    return None if folder is None else str(folder.absolute())


def _identity(path: Path) -> _Identity | None:
    """None if nothing exists there, or its file system has no inode numbers."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in folder.iterdir() if path.is_file())
    except OSError:
        return
