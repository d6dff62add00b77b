"""From what a user writes to a store: a path, a URI, or a name on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mergekit_ray.core.errors import ConfigError, ModelError, StorageError
from mergekit_ray.core.plan import InputModel
from mergekit_ray.core.secrets import holds_credential
from mergekit_ray.core.spelling import nearest
from mergekit_ray.storage.names import WEIGHT_SUFFIXES, check_text, is_weight_file
from mergekit_ray.storage.protocols import Sink, Source
from mergekit_ray.storage.schemes import SCHEMES, SINKS, Opener
from mergekit_ray.storage.single_file import SingleFile, single_file

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_HUB_FILE = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.\-]*/[\w.\-]+)/(?P<name>[^@]+)(@(?P<revision>.+))?", re.ASCII | re.DOTALL
)
_WITHOUT_SLASHES = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):(?!//)/?(.*)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?", re.ASCII)
_LOCK = threading.Lock()


def open_source(reference: str, revision: str | None = None) -> Source:
    """The store that holds a model.

    Args:
        reference: a folder; ``file://``, ``s3://bucket/prefix`` or ``hf://org/name[@revision]``; or ``org/name``, which
            is a folder if there is one and else a repository of the Hub. Or a single weight file in one of these.
        revision: branch, tag or commit, for the Hub.

    Raises:
        ConfigError: an unknown scheme, or a URI that holds a credential.
        ModelError: no such folder, file or repository.
        StorageError: the Hub, which a name may mean, cannot be reached; or a folder's path goes by a link that leads
            nowhere.
    """
    check_text(reference)
    scheme = _scheme_of(reference)
    if is_weight_file(reference):
        file = _open_file(reference, scheme, revision)
        if file is not None:
            return file
    if scheme:
        return _opener(scheme)(reference, revision)
    from mergekit_ray.storage.local.links import dangling_link  # noqa: PLC0415 - stores import this module

    path = Path(os.path.expanduser(reference))  # noqa: PTH111 - Path.expanduser fails if there is no such user
    # Path also fails if a name is too long for the file system. A link that leads nowhere is not a repository's name.
    if os.path.isdir(path) or dangling_link(path) is not None:  # noqa: PTH112
        return _opener("file")(reference, revision)
    if os.path.exists(path):  # noqa: PTH110
        raise ModelError(
            f"a model is a folder or a file that ends in {' or '.join(WEIGHT_SUFFIXES)}, and this is another file",
            where=reference,
            remedy=f"name {path.parent} instead",
        )
    if _HUB_NAME.fullmatch(reference) and not reference.endswith("/"):
        try:
            return _opener("hf")(f"hf://{reference}", revision)
        except (ModelError, StorageError) as error:
            folder = _nearest_folder(path)
            if folder is not None:
                error.remedy = f"{error.remedy}; or did you mean {folder}?"
            elif "/" not in reference:
                error.remedy = f"{error.remedy}; for a folder, write ./{reference}"
            raise
    folder = _nearest_folder(path)
    raise ModelError(
        "no such folder",
        where=reference,
        remedy=f"did you mean {folder}?"
        if folder
        else "give the folder that holds config.json and the safetensors files",
    )


def _open_file(reference: str, scheme: str | None, revision: str | None) -> SingleFile | None:
    """The weight file of that name; None where it is a folder's.

    Raises:
        ModelError: there is no such file, or what holds it.
    """
    if scheme in (None, "file"):
        text = unquote(urlsplit(reference).path, errors="surrogateescape") if scheme else reference
        path = os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 - as LocalStore does
        if os.path.isdir(path):  # noqa: PTH112
            return None
        if os.path.isfile(path):  # noqa: PTH113
            # Named by the user, it may be a link to wherever it is kept.
            folder, name = os.path.split(os.path.realpath(path))
            return single_file(_opener("file")(folder, revision), name, path)
        near = nearest(Path(path).name, _files_beside(Path(path)))
        # What lies beside existing files is none of a repository, which would be asked for over the network.
        if scheme or near or (found := _HUB_FILE.fullmatch(reference)) is None:
            raise ModelError(f"there is no such file{near}", where=reference, remedy="check the path")
    elif scheme == "hf":
        found = _HUB_FILE.fullmatch(reference.partition("://")[2])
        if found is None:
            return None
    else:
        parent, _, name = reference.rpartition("/")
        return None if parent.endswith(":/") else single_file(_opener(scheme)(parent, revision), name, reference)
    at = f"@{found['revision']}" if found["revision"] else ""
    store = _opener("hf")(f"hf://{found['repository']}{at}", revision)
    repository, _, commit = store.uri.partition("@")
    return single_file(store, found["name"], f"{repository}/{found['name']}" + (f"@{commit}" if commit else ""))


def _files_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir() if is_weight_file(entry.name)]
    except OSError:
        return []


def open_sources(inputs: Mapping[str, InputModel]) -> dict[str, Source]:
    """An open source for each input model of a plan, by its key. See `open_source` for the errors."""
    return {key: open_source(model.uri) for key, model in inputs.items()}


def open_sink(reference: str) -> Sink:
    """The store to write to: a path, ``file://`` or another writable scheme. A folder need not exist yet.

    Raises:
        ConfigError: an unknown scheme, a place that cannot be written, or a URI that holds a credential.
    """
    try:
        return _open_sink(reference)
    except ModelError as error:  # of a place that does not hold a model yet, the command is wrong
        raise ConfigError(error.what, where=error.where, remedy=error.remedy) from error


def _open_sink(reference: str) -> Sink:
    check_text(reference)
    name = _scheme_of(reference) or "file"
    if is_weight_file(reference) and not os.path.isdir(os.path.expanduser(reference)):  # noqa: PTH111, PTH112
        folder = reference.removesuffix(next(suffix for suffix in WEIGHT_SUFFIXES if reference.endswith(suffix)))
        raise ConfigError(
            "an output is a folder, which also holds the manifest, and this names a file",
            where=reference,
            remedy=f"write {folder}; the weight file is called like the inputs, or model.safetensors",
        )
    with _LOCK:
        open_output = SINKS.get(name) if name in SINKS else None
    if open_output is not None:
        return open_output(reference)
    store = _opener(name)(reference, None)
    if not isinstance(store, Sink):
        raise ConfigError(
            "this place can only be read",
            where=reference,
            remedy="write to a folder, s3://bucket/prefix or hf://org/name",
        )
    return store


def _scheme_of(reference: str) -> str | None:
    """The scheme of a URI, None for a path or a name.

    Raises:
        ConfigError: the URI holds a credential: URIs are printed, and written into manifests. Or it lacks its slashes.
    """
    scheme = _SCHEME.match(reference)
    short = _WITHOUT_SLASHES.fullmatch(reference)
    if short is not None and _is_known(short[1].lower()):
        raise ConfigError(
            f"after `{short[1]}:`, a URI has two slashes",
            where=reference,
            remedy=f"write {short[1]}://{'/' if short[1].lower() == 'file' else ''}{short[2]}, or ./{reference} "
            "for a folder of this name",
        )
    if scheme and holds_credential(reference):
        raise ConfigError(
            "a URI must not hold a credential",
            where=reference,
            remedy="take it out, and set it in the environment: HF_TOKEN, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
        )
    return scheme[1].lower() if scheme else None


def _opener(scheme: str) -> Opener:
    # A registry discovers its entries at the first look-up; two threads must not race through that.
    with _LOCK:
        return SCHEMES.get(scheme)


def _is_known(scheme: str) -> bool:
    with _LOCK:
        return scheme in SCHEMES or scheme in SINKS


def _nearest_folder(path: Path) -> Path | None:
    """The existing sibling of ``path`` that is spelt most like it."""
    try:
        siblings = {entry.name: entry for entry in path.parent.iterdir() if entry.is_dir()}
    except OSError:
        return None
    by_folded = {name.lower(): name for name in siblings}
    found = difflib.get_close_matches(path.name.lower(), sorted(by_folded), n=1, cutoff=0.6)
    return siblings[by_folded[found[0]]] if found else None
