"""Commits of Hugging Face Hub repositories that lie, whole or in part, in this machine's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.names import is_confined


def file_version(content: str, num_bytes: int) -> str:
    """A file's version, the same wherever it is read.

    Args:
        content: what the Hub names the content by, and a cache the blob: the SHA-256 of a large file, the git blob id
            of a small one.
        num_bytes: its size.
    """
    return f"{content}-{num_bytes}"


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a revision that is in the cache, perhaps not with all its files; None if there is none.

    Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache (layout of the cache).
    """
    from huggingface_hub import constants  # noqa: PLC0415 - it takes longer to import than `merge --help` may take

    # Not by `snapshot_download`: it does not find a reference that ends a line, as those made by hand do.
    revision = revision or constants.DEFAULT_REVISION
    if not is_confined(revision):
        return None
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # a commit has no reference
        revision = (repository / "refs" / revision).read_text().strip()
    snapshot = repository / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None


class HubCache(LocalSource):
    """One commit of a repository as far as it is in the cache, read only.

    Files in the cache are links to blobs named by their content. That name is part of the version, so every node agrees
    on it, whether its cache holds the commit or not. On a file system without links the cache holds the files
    themselves; their versions then name the commit, and only nodes with such caches agree.

    Args:
        name: of the repository.
        snapshot: the commit's folder.
    """

    def __init__(self, name: str, snapshot: Path) -> None:
        super().__init__(snapshot)
        self._name = name

    @property
    def uri(self) -> str:
        """``hf://org/name@commit``."""
        return f"hf://{self._name}@{self._root.name}"

    def holds_large_files(self, num_bytes: int) -> bool:
        """Whether any file has at least so many bytes."""
        return any(status.st_size >= num_bytes for _, status in self._walk(self._root, ""))

    def _version(self, name: str, status: os.stat_result) -> str:
        try:
            blob = (self._root / name).readlink().name
        except OSError:
            blob = self._root.name
        return file_version(blob, status.st_size)
