"""The place a merge writes to: what is already there, and whether it may be touched.

Beside the model lies ``.mergekit-ray/<plan digest>/<shard>.json``, a record of each finished shard, until the model is
published. They show a rerun of the same plan what is done, and another plan that the place is taken. A model that
replaces another is made in ``.mergekit-ray/<plan digest>/staged/`` first (`output.staging`).

This module changes nothing: the holder of the output's lease deletes what `Destination` lists.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mergekit_ray.checkpoint.side_files import is_side_file
from mergekit_ray.core.errors import CheckpointError, PlanError
from mergekit_ray.core.plan import INDEX_SUFFIX, STEM, InputModel, Plan
from mergekit_ray.core.record import ShardRecord, record_file
from mergekit_ray.output.occupant import files_told, occupant
from mergekit_ray.output.places import check_apart
from mergekit_ray.storage.fence import LEASE_FILE, WORK_FOLDER
from mergekit_ray.storage.names import is_confined
from mergekit_ray.storage.protocols import FileStat, MovingSink, PublishingSink, RemainsSink, Sink

INDEX_FILE: Final = f"{STEM}{INDEX_SUFFIX}"
MANIFEST_FILE: Final = "mergekit-ray.json"
CARD_FILE: Final = "README.md"
RECORD_ROOT: Final = WORK_FOLDER
STAGED: Final = "staged"
PLAN_FILE: Final = "plan.json"
"""In the folder of a plan's records: the note that the plan was begun, with its recipe."""

SWAP_FILE: Final = "swap.json"
"""In the folder of a plan's records: what its staged model replaces, once the swap has begun."""

_MAX_RECORD_BYTES: Final = 64 << 20

_CHECKPOINT_FILE = re.compile(
    r"[^/]*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)|[^/]*\.(safetensors|bin)\.index\.json|mergekit-ray\.json"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config|chat_template)\.json|merges\.txt|vocab\.txt|tokenizer\.model"
    r"|chat_template\.jinja|README\.md|mergekit_config\.yml"
)
"""Files in a folder's root that belong to a model: what ``--overwrite`` may remove."""

_STAGED_INDEX = re.compile(rf"/{STAGED}/[^/]+{re.escape(INDEX_SUFFIX)}$")

_WEIGHT_FILE = re.compile(r"[^/]*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)|[^/]*\.(safetensors|bin)\.index\.json")


@dataclass(frozen=True, slots=True)
class Destination:
    """What was found at the output.

    Attributes:
        sink: the store.
        record_folder: where records of this plan go.
        done: shards of this plan that are complete, by file name.
        published: the model is complete; there is nothing to do.
        is_complete: the model is complete, but what it was made with is still beside it.
        staging: folder in the store where the model is made first, if another is in its place.
        clear_first: what is deleted before anything is written: unfinished work of other plans.
        clear_last: what is deleted when the new model is complete: the old one.
    """

    sink: Sink
    record_folder: str
    done: Mapping[str, ShardRecord]
    published: bool = False
    is_complete: bool = False
    staging: str | None = None
    clear_first: tuple[str, ...] = ()
    clear_last: tuple[str, ...] = ()


def inspect(sink: Sink, plan: Plan, *, overwrite: bool) -> Destination:
    """Look at the output.

    Args:
        sink: the output.
        plan: to be carried out there.
        overwrite: another model, or another plan's unfinished work, that is already there may be replaced.

    Raises:
        PlanError: the place is taken, or it is not apart from the inputs (see `check_apart`).
    """
    check_inputs_apart(plan, sink.uri)
    folder = f"{RECORD_ROOT}/{plan.digest}"
    staging = f"{folder}/{STAGED}"
    present = {stat.name: stat for stat in sink.list()}
    _check_spellings(sink, present, _written(plan))
    manifest = _read_json(sink, MANIFEST_FILE) if MANIFEST_FILE in present else None
    ours = manifest is not None and manifest.get("plan_digest") == plan.digest
    is_begun = any(name.startswith(f"{folder}/") for name in present)
    is_staged = any(name.startswith(f"{staging}/") for name in present)
    if ours and manifest is not None and plan.index_file in present:
        records = _parse_records(manifest.get("shards", ()))
        if {record.file for record in records} >= {shard.file for shard in plan.shards} and all(
            _is_whole(record, present) for record in records
        ):
            # In a manifest they have no version. Where other files are missing, only these are published again.
            done = {record.file: replace(record, version=present[record.file].version) for record in records}
            is_complete = _has_files(manifest, present)
            return Destination(sink, folder, done, published=is_complete and not is_begun, is_complete=is_complete)
    if f"{folder}/{SWAP_FILE}" in present:  # agreed to, and begun
        return Destination(sink, folder, {}, staging=staging)
    foreign = _foreign(present, plan, folder, _side_files(manifest), resuming=(ours or is_begun) and not is_staged)
    work = _unfinished_work(foreign)
    if foreign and not overwrite and not _is_nothing(foreign):
        raise PlanError(
            _occupant(sink, plan, foreign, manifest) or files_told(foreign),
            where=sink.uri,
            remedy="choose another output, or pass `options=MergeOptions(overwrite=True)` to replace it",
        )
    is_model = work is None
    if is_staged or (is_model and not (ours or is_begun) and isinstance(sink, MovingSink)):
        return Destination(sink, folder, _done(sink, plan, present, f"{staging}/"), staging=staging, clear_last=foreign)
    if isinstance(sink, PublishingSink) or (is_model and not isinstance(sink, MovingSink)):
        work = frozenset(foreign)
    first, last = ([name for name in foreign if (name in (work or ())) is wanted] for wanted in (True, False))
    done = _done(sink, plan, present)
    return Destination(sink, folder, done, clear_first=tuple(first), clear_last=tuple(last))


def check_inputs_apart(plan: Plan, output: str) -> None:
    """Check that carrying out a plan at an output touches none of its inputs.

    Raises:
        PlanError: see `check_apart`.
    """
    # A recipe may merge a commit of a repository into the same repository: the commit stays, and so do the inputs.
    is_hub = output.startswith("hf://")
    inputs = {m.uri: m.files for m in plan.inputs.values() if not (is_hub and _names_its_commit(m))}
    check_apart(inputs, output, _written(plan))


def _occupant(sink: Sink, plan: Plan, foreign: Sequence[str], manifest: Mapping[str, Any] | None) -> str | None:
    """Whose output the place holds, by its manifest or else by the notes of unfinished plans."""
    if manifest is not None and (told := occupant(manifest, is_finished=True, plan=plan)):
        return told
    begun = (_read_json(sink, name) for name in foreign if name.endswith(f"/{PLAN_FILE}"))
    return next((told for note in begun if note and (told := occupant(note, is_finished=False, plan=plan))), None)


def may_go(name: str, plan: Plan) -> bool:
    """Whether a model that the plan replaces may have a file of this name, or another plan's notes.

    Others may write to the place, so a list of files found there is checked with this before any of them is deleted.
    """
    if not is_confined(name):
        return False
    if name.startswith(f"{RECORD_ROOT}/"):
        return name != LEASE_FILE and not name.startswith(f"{RECORD_ROOT}/{plan.digest}/")
    return _CHECKPOINT_FILE.fullmatch(name) is not None or is_side_file(name) or name in _written(plan)


def check_twins(destination: Destination, plan: Plan) -> None:
    """Check that names of the plan's files which differ only in case are two names at the output, as they were.

    Whether they are is asked of an existing file, `PLAN_FILE`.

    Raises:
        PlanError: they are one; names them.
    """
    names = sorted(_written(plan))
    spelt: dict[str, str] = {}
    twins = [(first, name) for name in names if (first := spelt.setdefault(name.casefold(), name)) != name]
    sink, folder = destination.sink, destination.record_folder
    if twins and sink.stat(f"{folder}/{PLAN_FILE.upper()}") is not None:
        raise _one_file(sink, *twins[0], "rename one of them beside the model that they are copied from")


def _check_spellings(sink: Sink, present: Collection[str], written: Collection[str]) -> None:
    """Check that no existing file is replaced because its name differs only in case from one of the plan's.

    Raises:
        PlanError: something would be.
    """
    ours = {name.casefold(): name for name in written if name not in present}
    for name in present:
        mine = ours.get(name.casefold())
        if mine is not None and name not in written and sink.stat(mine) is not None:
            raise _one_file(sink, name, mine, "rename or remove it")


def _one_file(sink: Sink, first: str, second: str, remedy: str) -> PlanError:
    return PlanError(
        f"{first} and {second} are one file here: this file system ignores case",
        where=sink.uri,
        remedy=f"{remedy}, or choose an output on another file system",
    )


def clear(sink: Sink, names: Collection[str]) -> None:
    """Delete files of a model: indexes first, so that no reader sees half of it; the manifest, which knows what else
    there is, last.
    """  # noqa: D205 - one sentence
    sink.delete(sorted(name for name in names if name.endswith(".index.json")))
    sink.delete(sorted(name for name in names if name != MANIFEST_FILE and not name.endswith(".index.json")))
    sink.delete([name for name in names if name == MANIFEST_FILE])


def discard_attempts(destination: Destination, files: Sequence[str]) -> None:
    """Remove what is left of attempts at these shards, and at their records; the lease says that nobody writes them."""
    if isinstance(destination.sink, RemainsSink):
        destination.sink.discard_remains([*files, *(record_file(destination.record_folder, file) for file in files)])


def clear_notes(sink: Sink) -> None:
    """Delete the notes beside a complete model, except the lease."""
    names = [stat.name for stat in sink.list()]
    sink.delete([name for name in names if name.startswith(f"{RECORD_ROOT}/") and name != LEASE_FILE])


def _done(sink: Sink, plan: Plan, present: Mapping[str, FileStat], root: str = "") -> dict[str, ShardRecord]:
    """Shards of the plan that are whole below a folder of the store, by the records there."""
    folder = f"{root}{RECORD_ROOT}/{plan.digest}"
    names = [name for shard in plan.shards if (name := record_file(folder, shard.file)) in present]
    records = _parse_records(_read_json(sink, name) for name in names)
    here = {name.removeprefix(root): stat for name, stat in present.items() if name.startswith(root)}
    return {record.file: record for record in records if _is_whole(record, here)}


def _unfinished_work(foreign: Collection[str]) -> frozenset[str] | None:
    """Those of the foreign files that are unfinished work of other plans; None if a model is among them.

    Weights without an index are unfinished work if they have a record. A staged model is one, from its index on.
    """
    notes = {name for name in foreign if name.startswith(f"{RECORD_ROOT}/")}
    recorded = {name.split("/")[2].removesuffix(".json") for name in notes if name.count("/") == 2}
    models = [name for name in foreign if name not in notes and _WEIGHT_FILE.fullmatch(name) and name not in recorded]
    if models or any(name.endswith(f"/{SWAP_FILE}") or _STAGED_INDEX.search(name) for name in notes):
        return None
    return frozenset(notes | {name for name in foreign if name in recorded})


def _is_nothing(foreign: Collection[str]) -> bool:
    """Whether these are the notes of merges that ended before they had finished anything."""
    return all(name.startswith(f"{RECORD_ROOT}/") and name.endswith(f"/{PLAN_FILE}") for name in foreign)


def _names_its_commit(model: InputModel) -> bool:
    return model.uri.startswith("hf://") and model.uri.removeprefix("hf://") in model.reference


def _written(plan: Plan) -> frozenset[str]:
    """Names of all files that a plan writes."""
    named = {*(shard.file for shard in plan.shards), *(side.file.name for side in plan.side_files)}
    config = ["config.json"] if plan.config else []
    return frozenset({plan.index_file, MANIFEST_FILE, CARD_FILE, *config, *named, *plan.generated_files})


def _side_files(manifest: Mapping[str, Any] | None) -> frozenset[str]:
    """What a published model's manifest says was copied beside its weights, as far as a merge copies such files."""
    listed = (manifest or {}).get("side_files")
    names = listed if isinstance(listed, list) else ()
    return frozenset(name for name in names if isinstance(name, str) and is_side_file(name))


def _foreign(
    present: Mapping[str, FileStat], plan: Plan, folder: str, old_side_files: Collection[str], *, resuming: bool
) -> tuple[str, ...]:
    """Files that this plan did not write and that a model there would be confused with."""
    ours = _written(plan)
    found = []
    for name in present:
        if name.startswith(f"{RECORD_ROOT}/"):
            if name != LEASE_FILE and not name.startswith(f"{folder}/"):
                found.append(name)
        elif resuming:
            # Our own unfinished work: only weights of another model beside it are in the way.
            if _WEIGHT_FILE.fullmatch(name) and name not in ours:
                found.append(name)
        elif _CHECKPOINT_FILE.fullmatch(name) or name in ours or name in old_side_files:
            found.append(name)
    return tuple(sorted(found))


def _has_files(manifest: Mapping[str, Any], present: Mapping[str, FileStat]) -> bool:
    """Whether every other file that a manifest lists exists at its size; a card may be edited."""
    files = manifest.get("files", {})
    sizes = {name: stat.num_bytes for name, stat in present.items()}
    return isinstance(files, dict) and all(
        name == CARD_FILE or (isinstance(file, dict) and sizes.get(name) == file.get("num_bytes"))
        for name, file in files.items()
    )


def _is_whole(record: ShardRecord, present: Mapping[str, FileStat]) -> bool:
    stat = present.get(record.file)
    return stat is not None and stat.num_bytes == record.num_bytes and record.version in ("", stat.version)


def _parse_records(found: Iterable[Mapping[str, Any] | None]) -> list[ShardRecord]:
    """The records that can be read; a shard without a readable one is simply done again."""
    records = []
    for data in found:
        with contextlib.suppress(ValueError):
            if data is not None:
                records.append(ShardRecord.from_json(data))
    return records


def _read_json(sink: Sink, name: str) -> dict[str, Any] | None:
    """The object in a file; None if it holds none, as one that is not ours may."""
    try:
        data = json.loads(sink.read(name, max_bytes=_MAX_RECORD_BYTES))
    except (ValueError, CheckpointError):
        return None
    return data if isinstance(data, dict) else None
