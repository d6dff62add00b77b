"""File names inside a store: confined to its root, whatever an index or a caller says."""

from __future__ import annotations

from mergekit_ray.core.errors import CheckpointError, ModelError


def is_confined(name: str) -> bool:
    """Whether ``name`` is a relative ``/``-separated path that stays below the root and has one spelling."""
    return _is_text(name) and all(part not in ("", ".", "..") for part in name.split("/"))


def check_text(place: str) -> None:
    """Refuse a path or URI that can neither be opened nor written into a manifest.

    Raises:
        ModelError: it is not valid Unicode, or holds a null character.
    """
    if not _is_text(place):
        raise ModelError("not valid Unicode, or with a null character", where=ascii(place), remedy="rename the folder")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def check_name(name: str, where: str) -> None:
    """Refuse a name that would leave the store.

    Raises:
        CheckpointError: it is empty, absolute, or has an empty, ``.`` or ``..`` part.
    """
    if not is_confined(name):
        raise CheckpointError(
            f"{name!r} is not the name of a file inside it",
            where=where,
            remedy="names are relative to the folder or prefix, without '.', '..' and empty parts",
        )
