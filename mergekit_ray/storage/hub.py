"""Repositories of the Hugging Face Hub that are already in this machine's cache."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit_ray.core.errors import ModelError
from mergekit_ray.storage.local import LocalSource
from mergekit_ray.storage.schemes import SCHEMES


class HubCache(LocalSource):
    """One commit of a cached repository, read only.

    Files in the cache are links to blobs named by their content's hash. That name is the version, so every node whose
    cache holds the commit agrees on it.
    """

    def __init__(self, name: str, snapshot: Path) -> None:
        super().__init__(snapshot)
        self._name = name

    @property
    def uri(self) -> str:
        """``hf://org/name@commit``."""
        return f"hf://{self._name}@{self._root.name}"

    def _version(self, name: str, status: os.stat_result) -> str:
        path = self._root / name
        try:
            blob = path.readlink().name
        except OSError:  # a cache without links holds the files themselves
            blob = self._root.name
        return f"{blob}-{status.st_size}"


@SCHEMES.register("hf")
def open_cached(uri: str, revision: str | None) -> HubCache:
    """The cached snapshot at ``hf://org/name[@revision]``; without a revision, of ``main``.

    Raises:
        ModelError: the name is not one the Hub could have, or the revision is not in the cache.
    """
    name, _, at = uri.removeprefix("hf://").strip("/").partition("@")
    if at and revision is not None and at != revision:
        raise ModelError(f"two revisions: {at!r} and {revision!r}", where=uri, remedy="leave one out")
    revision = at or revision
    # Here, not at the top: it takes longer to import than `merge --help` may take.
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    wanted = f"{name}@{revision}" if revision else name
    download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        snapshot = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except HFValidationError as error:
        raise ModelError(
            "neither a folder nor a name the Hugging Face Hub could have",
            where=wanted,
            remedy="names look like org/name",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            "neither a folder nor in the Hugging Face cache of this machine",
            where=wanted,
            remedy=f"fetch it first: {download}",
        ) from error
    return HubCache(name, Path(snapshot))
