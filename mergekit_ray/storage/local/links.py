"""Symbolic links in a folder that holds a model: which of them are followed.

A merge publishes what a link leads to, even on the Hub, and somebody else's model may hold a ``tokenizer.json`` that is
a link to ``/etc/shadow``. So only these links are followed:

- links that stay inside the model's folder (which may be a link itself, wherever it leads);
- in a snapshot of huggingface_hub's cache, those to its blobs: ``<repository>/snapshots/<commit>/config.json`` leads to
  ``<repository>/blobs/<hash>``. Where the folder of blobs, or a blob, is a link itself, to a store that several caches
  share, the file that it leads to must be named by a hash as well. Names that long are no accident, and no ``shadow``.
- links into the folders that ``MERGEKIT_RAY_LINKS_INTO`` names.

The last is for folders of links made on purpose, as DVC does. It is an environment variable rather than an option or
part of a recipe, because the machine's owner decides where links may lead, not the author of the model or the recipe.
Workers read their own.

Nothing is written through a link below an output: a link in the place of a file is replaced, one in the place of a
folder is refused.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import Final

from mergekit_ray.core.errors import CheckpointError, PlanError, StorageError

LINKS_VARIABLE: Final = "MERGEKIT_RAY_LINKS_INTO"
_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of git, SHA-256


def check_link(root: Path, path: Path) -> None:
    """Check that a file is one of the model's, wherever links lead.

    Args:
        root: the model's folder.
        path: an existing file below it.

    Raises:
        CheckpointError: a link leads elsewhere; names it and its target.
    """
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if target.is_relative_to(folder) or _is_blob(folder, target):
        return
    allowed = os.environ.get(LINKS_VARIABLE, "").split(os.pathsep)
    if any(target.is_relative_to(os.path.realpath(each)) for each in allowed if Path(each).is_absolute()):
        return
    kind = "a link to" if path.is_symlink() else "in a folder that is a link, so it is really"
    raise CheckpointError(
        f"{kind} {target}, which is outside of the model's folder and would be published with it",
        where=str(path),
        remedy="copy the file here, or name the folder that it is in as the model; if the link is meant, name the "
        f"folder that it leads into in {LINKS_VARIABLE}, on every machine that reads it",
    )


def check_written(root: Path, path: Path, *, itself: bool = False) -> None:
    """Check that a file which is to be written or removed is in the output itself.

    Args:
        root: the output's folder, which may be a link.
        path: of the file, there or not.
        itself: the file must not be a link either.

    Raises:
        PlanError: a folder between the two is a link; names it and its target.
    """
    for each in (path, *path.parents)[not itself :]:
        if each == root:
            return
        if os.path.islink(each):  # noqa: PTH114 - False, not an error, where it may not be looked at
            raise PlanError(
                f"a link to {os.readlink(each)}: nothing is written through a link in the output",  # noqa: PTH115
                where=str(each),
                remedy="remove the link, or choose another output; the output's folder itself may be a link",
            )


def dangling_link(path: Path) -> Path | None:
    """The link on the way to a folder that leads nowhere; None if there is none."""
    way = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    # Unlike the methods of pathlib, these give False, not an error, if permission is denied.
    links = (each for each in (way, *way.parents) if os.path.islink(each))  # noqa: PTH114
    return next((each for each in links if not os.path.exists(each)), None)  # noqa: PTH110


def check_folder(path: Path) -> None:
    """Check that no link on the way to a folder leads nowhere, whether the folder is there yet or not.

    Raises:
        StorageError: one does; names it and its target.
    """
    link = dangling_link(path)
    if link is not None:
        raise StorageError(
            f"{link} is a link to {os.readlink(link)}, which is not there, or may not be read",  # noqa: PTH115 - as written
            where=str(path),
            remedy="mount or make the folder that it leads to, or remove the link",
            retryable=False,
        )


def file_status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of a file, or of what a link to one leads to; None for anything else, and for links that lead nowhere."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return status if S_ISREG(status.st_mode) else None


def check_links(root: Path, is_wanted: Callable[[str], bool]) -> None:
    """Check that all of wanted names below a folder are files, or links to files of the model.

    Raises:
        CheckpointError: as `check_link`; or a link leads nowhere, or to a folder with wanted files, which are not
            listed; or one is a pipe or something similar.
    """
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in sorted([*folders, *files])):
            name = path.relative_to(root).as_posix()
            if not path.is_symlink():
                if path.name in files and is_wanted(name) and not path.is_file():
                    raise CheckpointError(
                        "neither a file nor a folder (a pipe, a socket or a device)",
                        where=str(path),
                        remedy="put the file in its place, or remove it",
                    )
                continue
            if os.path.isdir(path):  # noqa: PTH112 - False, not an error, where it may not be looked at
                held = next((each.name for each in path.glob("*") if is_wanted(f"{name}/{each.name}")), None)
                if held is not None:
                    raise CheckpointError(
                        f"a link to a folder, {os.path.realpath(path)}: {held} in it would be left out",
                        where=str(path),
                        remedy="copy the folder here, in place of the link",
                    )
            elif is_wanted(name):
                if not os.path.exists(path):  # noqa: PTH110 - as above
                    raise leads_nowhere(path)
                check_link(root, path)


def _is_blob(folder: Path, target: Path) -> bool:
    """Whether a file is a blob of the cached repository that a folder is a snapshot of, or is below one."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots":
            blobs = parent.parent.parent / "blobs"
            return target.parent == blobs or (_HASH.fullmatch(target.name) is not None and blobs.is_dir())
    return False


def leads_nowhere(link: Path) -> CheckpointError:
    """The error for a link in a model's folder whose target is not there."""
    return CheckpointError(
        f"a link to {os.readlink(link)}, which is not there, or may not be read",  # noqa: PTH115 - as it is written, with any '..'
        where=str(link),
        remedy="download or copy what it leads to, or remove the link",
    )
