"""File names inside a store: confined to its root, whatever an index or a caller says."""

from __future__ import annotations

from mergekit_ray.core.errors import CheckpointError, ModelError

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that torch.save wrote."""

WEIGHT_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)
"""Endings of files that are a model by themselves, where a recipe names one."""


def file_name(uri: str) -> str:
    """The last component of a file's path or URI, without the revision that ``hf://`` may give behind it."""
    return (uri.partition("@")[0] if uri.startswith("hf://") else uri).rpartition("/")[2]


def repository_of(uri: str) -> str:
    """The name of the Hub repository, ``org/name``, of an ``hf://`` URI of it or of a file in it."""
    return "/".join(uri.removeprefix("hf://").partition("@")[0].split("/")[:2])


def is_weight_file(uri: str) -> bool:
    """Whether a path or URI is, by its ending, that of a weight file rather than of a folder."""
    return file_name(uri).endswith(WEIGHT_SUFFIXES)


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
