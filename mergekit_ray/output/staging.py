"""Replacing a model by another, of which one or the other always exists.

The new model is made beside the old one, in ``.mergekit-ray/<plan digest>/staged/``: an output like any other, with its
own records, published there when it is whole. Until then nothing of the old one is touched; a merge that fails or is
stopped leaves it as it was. Then the two are swapped:

1. ``swap.json`` is written: what goes and what comes. From here on, running the merge again only swaps.
2. The old model's index goes, then all else of it.
3. The new model's files are moved to where they belong, the index last; what was left beside it goes.

A reader sees the old model until 2, then none, and with the index in 3 the new one. On a disk, that takes the time of
as many renames; on S3, of copies that the server makes of all shards (gigabytes a second within a region). Somebody who
has read the old index and opens its shards during the swap may find them gone, or find the new ones under the same
names.

Repositories of the Hub need none of this: their readers see nothing before one commit. On other stores that cannot move
files, the old model is deleted before the new one is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.output.destination import (
    MANIFEST_FILE,
    RECORD_ROOT,
    SWAP_FILE,
    Destination,
    clear,
    inspect,
    may_go,
)
from mergekit_ray.storage.fence import Fence, open_fenced
from mergekit_ray.storage.protocols import MovingSink, Sink

_MAX_SWAP_BYTES: Final = 64 << 20


def staged(plan: Plan, destination: Destination, fence: Fence) -> Destination:
    """The place where the model is made first, as a destination of its own, behind the output's fence."""
    sink = open_fenced(f"{destination.sink.uri}/{destination.staging}", fence)
    found = inspect(sink, plan, overwrite=True)
    # A complete model counts as published: the swap removes the notes beside it.
    return replace(found, published=found.is_complete)


def is_swapping(destination: Destination) -> bool:
    """Whether the staged model is already replacing the old one."""
    return destination.sink.stat(f"{destination.record_folder}/{SWAP_FILE}") is not None


def swap(plan: Plan, destination: Destination) -> None:
    """Replace the old model by the staged one, or go on with that.

    Raises:
        StorageError: the store failed, or the staged model is not whole. Running the merge again goes on.
        CheckpointError: the note of what is to go is not one that a merge has written.
    """
    sink, staging = destination.sink, destination.staging
    assert staging is not None
    assert isinstance(sink, MovingSink)
    note = f"{destination.record_folder}/{SWAP_FILE}"
    names = {stat.name for stat in sink.list()}
    if note not in names:
        comes = [name.removeprefix(f"{staging}/") for name in names if name.startswith(f"{staging}/")]
        comes = [name for name in comes if not name.startswith(f"{RECORD_ROOT}/")]
        old = {*destination.clear_last, *(name for name in comes if name in names)}
        sink.put(note, json.dumps({"format": 1, "goes": sorted(old), "comes": sorted(comes)}).encode())
    goes, coming = _read(plan, sink, note)
    comes = [name for name in coming if f"{staging}/{name}" in names]
    # What has come already is not to go any more.
    clear(sink, goes - (coming - set(comes)))
    _move(sink, staging, [name for name in comes if name not in (plan.index_file, MANIFEST_FILE)])
    _check(plan, sink)
    _move(sink, staging, [name for name in comes if name == MANIFEST_FILE])
    _move(sink, staging, [name for name in comes if name == plan.index_file])


def _move(sink: MovingSink, staging: str, names: Sequence[str]) -> None:
    sink.move({f"{staging}/{name}": name for name in names})


def _check(plan: Plan, sink: Sink) -> None:
    """Check that every shard has come, before the index says so."""
    for shard in plan.shards:
        stat = sink.stat(shard.file)
        if stat is None or stat.num_bytes != shard.num_bytes:
            raise StorageError(
                "a shard of the new model did not come where it belongs",
                where=f"{sink.uri}/{shard.file}",
                remedy="something else writes to this place; delete what is there, and merge again",
                retryable=False,
            )


def _read(plan: Plan, sink: Sink, note: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of what goes and of what comes."""

    def fault(what: str) -> CheckpointError:
        remedy = "somebody else wrote it; delete it, and merge again"
        return CheckpointError(what, where=f"{sink.uri}/{note}", remedy=remedy)

    try:
        data = json.loads(sink.read(note, max_bytes=_MAX_SWAP_BYTES))
        lists = data["goes"], data["comes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        lists = None, None
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists):
        raise fault("not what was written")
    goes, comes = map(frozenset, lists)
    strange = next((name for name in sorted(goes) if not may_go(name, plan)), None)
    if strange is not None:
        raise fault(f"it has {strange!r} deleted, which is not a file of a model")
    return goes, comes
