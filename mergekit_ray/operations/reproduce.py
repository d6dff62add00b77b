"""`reproduce`: repeat a merge from its manifest alone, and check that every byte is the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.header import parse_header
from mergekit_ray.checkpoint.layout import encode_header, in_file_order
from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.stages import StagedRecipe
from mergekit_ray.config.transplant import TransplantOptions
from mergekit_ray.core.arguments import check_argument, options_or
from mergekit_ray.core.errors import CheckpointError, PlanError
from mergekit_ray.core.plan import InputFile, OutputTensor, Plan, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.version import __version__
from mergekit_ray.evaluation.device.names import CPU
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.planned_transplant import planned
from mergekit_ray.operations.prepare import make_routers
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.output.destination import CARD_FILE, MANIFEST_FILE
from mergekit_ray.output.manifest import FileDigest, is_intact, listed_files, read_manifest
from mergekit_ray.output.provenance import header_digest
from mergekit_ray.planning.make import check_plannable, make_plan, referenced_models, stage_names, stages_of
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.showing import visible
from mergekit_ray.storage.opening import open_source
from mergekit_ray.storage.protocols import FileStat, Source


@dataclass(frozen=True, slots=True)
class Reproduction:
    """How it went.

    Attributes:
        uri: where the model is.
        num_shards: that were compared, beside the files that the manifest lists.
        problems: what is not as the manifest says, in words, each naming a file; empty if all came out the same.
        notes: what differs and need not matter: versions of software, and of inputs whose content is the same.
    """

    uri: str
    num_shards: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """All came out the same."""
        return not self.problems

    def __repr__(self) -> str:
        found = "all as the manifest says" if self.ok else counted(len(self.problems), "problem")
        return f"<Reproduction {self.uri}: {counted(self.num_shards, 'shard')}, {found}>"

    def _repr_html_(self) -> str:
        rows = {
            "where": self.uri,
            "shards": f"{self.num_shards:,}",
            "problems": "\n".join(self.problems) or "none",
            **({"notes": "\n".join(self.notes)} if self.notes else {}),
        }
        return table("Reproduction", rows)


def reproduce(
    manifest: Mapping[str, Any] | str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    progress: bool = True,
    reporter: Reporter | None = None,
    stop: threading.Event | None = None,
) -> Reproduction:
    """Merge again what a manifest describes, from the inputs it pins, and compare the digests of all files.

    All but the model card, which names the version of mergekit-ray.

    Inputs are opened at the URIs of the manifest: Hub repositories at their commit, folders and prefixes where they
    were. Each file must have the size and, where the manifest says it, the header that it had.

    Args:
        manifest: its content, its file, or its model.
        output: folder or URI.
        options: how to run it; on the CPU if None, whose results do not depend on the machine.
        progress: without a reporter, show a live bar in a notebook or on a terminal.
        reporter: told what happens in its place, a `mergekit_ray.Reporter`.
        stop: set it from another thread to stop; running it again resumes.

    Raises:
        CheckpointError: an input is another than it was, or the recipe makes other tensors now.
        PlanError: the model is at the output already.
        MergekitRayError: as `mergekit_ray.merge`.
    """
    options = options_or(MergeOptions(device=CPU), options)
    check_argument("output", output, (str, os.PathLike), "a folder or URI")
    options.check()
    if isinstance(manifest, str | Path):
        manifest = read_manifest(str(manifest))
    try:
        records = [ShardRecord.from_json(record) for record in manifest["shards"]]
        files = listed_files(manifest)
        plan, notes = _plan(manifest, records, options)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the manifest was changed: {error}", where=MANIFEST_FILE, remedy="fetch it again"
        ) from error
    with visible(reporter, progress=progress) as tell:
        result = run_plan(plan, os.fspath(output), options, reporter=tell, stop=stop)
    if result.was_there:
        raise PlanError(
            "the result is already there, so nothing was computed and there is nothing to compare",
            where=result.uri,
            remedy="choose another output; verify compares a model with its own manifest",
        )
    made = read_manifest(result.uri)
    again = {record["file"]: record for record in made["shards"]}
    problems = [problem for record in records for problem in _differences(record, again.get(record.file))]
    problems += _file_differences(files, listed_files(made))
    remarks = (*_manifest_notes(manifest), *_software_notes(manifest), *_device_notes(records, again), *notes)
    return Reproduction(result.uri, len(records), tuple(problems), remarks)


def _plan(manifest: Mapping[str, Any], records: list[ShardRecord], options: MergeOptions) -> tuple[Plan, list[str]]:
    if "transplant" in manifest["recipe"]:
        return _transplant(manifest, records)
    recipe = check_plannable(load_recipe(dict(manifest["recipe"])))
    if not isinstance(recipe, StagedRecipe):  # whose stages have seeds of their own
        recipe = recipe.model_copy(update={"seed": manifest["seed"]})
    notes = _check_inputs(manifest["inputs"])
    checkpoints = _open_pinned(referenced_models(recipe), manifest["inputs"], stage_names(recipe))
    last = stages_of(recipe)[-1]
    routing = partial(make_routers, last, checkpoints, options) if isinstance(last, MoeRecipe) else None
    plan = make_plan(
        recipe,
        checkpoints,
        routing,
        allow_config_conflicts=options.allow_config_conflicts,
        unsafe_ignore_tokenizers=options.unsafe_ignore_tokenizers,
    )
    _check_read(plan, manifest["inputs"])
    return _laid_out_as(plan, records), notes


def _transplant(manifest: Mapping[str, Any], records: list[ShardRecord]) -> tuple[Plan, list[str]]:
    wanted = dict(manifest["recipe"]["transplant"])
    model, donor = (ModelReference.from_data(wanted.pop(name)) for name in ("model", "donor"))
    notes = _check_inputs(manifest["inputs"])
    checkpoints = _open_pinned([model, donor], manifest["inputs"])
    plan = planned(model, donor, checkpoints, TransplantOptions(**wanted, seed=manifest["seed"]))
    _check_read(plan, manifest["inputs"])
    return _laid_out_as(plan, records), notes


def _open_pinned(
    references: list[ModelReference], inputs: Mapping[str, Mapping[str, Any]], stages: Collection[str] = ()
) -> dict[ModelReference, Checkpoint]:
    """The models as the manifest pins them, under the recipe's names for them: random masks depend on these."""
    pinned = {reference: _pinned(reference, inputs) for reference in references}
    opened = open_models(list(pinned.values()), stages, allow_raw=True)
    return {reference: _named(opened[at], reference) for reference, at in pinned.items()}


def _named(checkpoint: Checkpoint, reference: ModelReference) -> Checkpoint:
    named = replace(checkpoint, reference=str(replace(reference, lora=None)))
    if not isinstance(named, AdaptedCheckpoint):
        return named
    factors = replace(named.adapter.checkpoint, reference=str(reference.lora))
    return replace(named, adapter=replace(named.adapter, checkpoint=factors))


def _pinned(reference: ModelReference, inputs: Mapping[str, Mapping[str, Any]]) -> ModelReference:
    lora = None if reference.lora is None else _pinned(reference.lora, inputs)
    plain = replace(reference, lora=None)
    found = inputs.get(str(plain))
    if found is None:  # nothing of its weights is read
        return replace(plain, lora=lora)
    uri = str(found["uri"])
    path, _, commit = uri.rpartition("@") if uri.startswith("hf://") and "@" in uri else (uri, "", None)
    return ModelReference(path, commit, lora)


def _check_inputs(inputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that every file is the one the merge read. Returns differences that need not matter."""
    notes = []
    for model in inputs.values():
        source = open_source(str(model["uri"]))
        for name, pin in model["files"].items():
            stat = source.stat(name)
            if stat is None or stat.num_bytes != pin["num_bytes"] or not _has_header(source, stat, pin):
                raise CheckpointError(
                    "not the file that the model was made from: it is gone, or its size or header differs",
                    where=f"{source.uri}/{name}",
                    remedy="put the original back; the manifest names its version",
                )
            if stat.version != pin["version"]:
                notes.append(f"{source.uri}/{name}: another version, with the size and header of the original")
    return notes


def _has_header(source: Source, stat: FileStat, pin: Mapping[str, Any]) -> bool:
    wanted = pin.get("header_sha256")
    return wanted is None or header_digest(source, InputFile(stat.name, stat.num_bytes, stat.version)) == wanted


def _check_read(plan: Plan, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the merge reads no other files than the first one did."""
    known = {(model["uri"], name) for model in inputs.values() for name in model["files"]}
    for model in plan.inputs.values():
        for name in model.files:
            if (model.uri, name) not in known:
                raise CheckpointError(
                    "this file was not read when the model was made",
                    where=f"{model.uri}/{name}",
                    remedy="check the input's index",
                )


def _laid_out_as(plan: Plan, records: list[ShardRecord]) -> Plan:
    """The plan with its tensors in the files that they were in: the recipe does not say how large those are."""
    tensors = {tensor.spec.name: tensor for shard in plan.shards for tensor in shard.tensors}
    wanted = [name for record in records for name in record.tensors]
    if sorted(wanted) != sorted(tensors):
        other = sorted({*wanted} ^ {*tensors}) or sorted(wanted)
        raise CheckpointError(
            f"the recipe makes other tensors than the manifest lists, first {other[0]!r}",
            where=MANIFEST_FILE,
            remedy=f"use the version of mergekit-ray that it names; this is {__version__}",
        )
    metadata = _metadata(plan)
    shards = []
    for record in records:
        specs = in_file_order([tensors[name].spec for name in record.tensors])
        laid, offset = [], 0
        for spec in specs:
            laid.append(OutputTensor(spec, tensors[spec.name].expression, offset, offset + spec.num_bytes))
            offset += spec.num_bytes
        shards.append(Shard(record.file, encode_header(specs, metadata), tuple(laid)))
    return replace(plan, shards=tuple(shards))


def _metadata(plan: Plan) -> Mapping[str, str]:
    """Of its files' headers, which all have the same."""
    shard = plan.shards[0]
    return parse_header(shard.header, shard.num_bytes, shard.file).metadata


def _differences(record: ShardRecord, again: Mapping[str, Any] | None) -> list[str]:
    if again is None:
        return [f"{record.file}: was not made"]
    found = ShardRecord.from_json(again)
    differing = [name for name, digest in record.tensors.items() if found.tensors.get(name) != digest]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        return [f"{record.file}: tensor {differing[0]!r}{more} came out different (XXH3-128 differs)"]
    if found.sha256 != record.sha256:
        return [f"{record.file}: came out different (SHA-256 differs)"]
    return []


def _file_differences(files: Mapping[str, FileDigest] | None, again: Mapping[str, FileDigest] | None) -> list[str]:
    """Which other files differ, if both manifests list them."""
    if files is None or again is None:
        return []
    names = sorted((files.keys() | again.keys()) - {CARD_FILE})
    return [
        f"{name}: {'was not made' if name not in again else 'came out different (SHA-256 differs)'}"
        for name in names
        if files.get(name) != again.get(name)
    ]


def _manifest_notes(manifest: Mapping[str, Any]) -> list[str]:
    """An edited manifest may be meant: inputs are moved."""
    intact = is_intact(manifest)
    if intact is None:
        return ["the manifest is of an earlier version: it lists no files beside the weights to compare"]
    return [] if intact else [f"{MANIFEST_FILE} was changed after it was written (its own digest differs)"]


def _device_notes(records: list[ShardRecord], again: Mapping[str, Mapping[str, Any]]) -> list[str]:
    made, found = ({record.device for record in x} for x in (records, map(ShardRecord.from_json, again.values())))
    if made == found:
        return []
    return [f"made on {', '.join(sorted(made))}, reproduced on {', '.join(sorted(found))}: choose the same device"]


def _software_notes(manifest: Mapping[str, Any]) -> list[str]:
    here = {"mergekit-ray": __version__, "torch": metadata.version("torch")}
    return [
        f"made with {name} {manifest['software'].get(name)}, reproduced with {version}"
        for name, version in here.items()
        if manifest["software"].get(name) != version
    ]
