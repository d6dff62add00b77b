"""A LoRA adapter from a fine-tuned model and its base: the truncated singular value decomposition of their difference.

    1. spectra    only for --energy: the singular values of every matrix's difference, from which ranks follow
    2. factors    b, a and what they leave of every matrix; the norms of all differences that are not covered
    3. adapter    the factors copied into one file as PEFT wants it, and its config

The first two are ordinary plans, one shard for a matrix, run by the same executors as merges into a folder beside the
result; so they are spread over workers, bounded in memory, and resumed after a failure. The last is a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mergekit_ray.checkpoint.adapter import PICKLED_NAME, WEIGHTS_NAME
from mergekit_ray.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from mergekit_ray.checkpoint.layout import encode_header, in_file_order
from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.arguments import check_argument, options_or
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, ModelError, PlanError
from mergekit_ray.core.expressions import (
    Cast,
    Expression,
    Load,
    LowRankFactors,
    SingularValues,
)
from mergekit_ray.core.machine import available_cpus
from mergekit_ray.core.plan import InputFile, InputModel, OutputTensor, Plan, Shard
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.operations.extract_options import ExtractOptions
from mergekit_ray.operations.extraction_report import (
    BASE_SUFFIX,
    ExtractResult,
    card,
    from_data,
    read_small,
    report_of,
    to_data,
)
from mergekit_ray.operations.extraction_stage import Stage
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.output.occupant import files_told, occupant
from mergekit_ray.output.places import check_apart
from mergekit_ray.planning.agreement import check_pair
from mergekit_ray.planning.extraction import Extraction, Target, adapter_config, extraction
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.make import inputs_of, models_of
from mergekit_ray.planning.windows import comfortable_memory
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.showing import visible
from mergekit_ray.storage.opening import open_sink, open_source
from mergekit_ray.storage.protocols import PublishingSink

WORK_FOLDER: Final = ".mergekit-ray-extract"
MANIFEST_FILE: Final = "mergekit-ray.json"

_OWN_FILES = (ADAPTER_CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME, "README.md", MANIFEST_FILE)
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_LOCAL_WORKERS = 4
_WORK_KEY = "work"


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    wanted: ExtractOptions,
    options: MergeOptions | None = None,
    *,
    progress: bool = True,
    reporter: Reporter | None = None,
    stop: threading.Event | None = None,
) -> ExtractResult:
    """Write the difference of two models as a LoRA adapter that PEFT loads.

    Args:
        tuned: the fine-tuned model, as a recipe names it.
        base: what it was tuned from.
        output: folder or ``s3://bucket/prefix``.
        wanted: ranks and coverage.
        options: how to run it.
        progress: without a reporter, show a live bar in a notebook or on a terminal.
        reporter: told what happens in its place, a `mergekit_ray.Reporter`.
        stop: set it from another thread to stop; running it again resumes.

    Returns:
        What the adapter holds and what it does not.

    Raises:
        MergekitRayError: the models do not go together, or something failed; finished work is kept for the next run.
    """
    chosen = options_or(MergeOptions(), options)
    check_argument("wanted", wanted, ExtractOptions, "`wanted=ExtractOptions(rank=16)`")
    check_argument("output", output, (str, os.PathLike), "a folder or URI")
    chosen.check()
    with visible(reporter, progress=progress) as tell:
        return _Extraction(os.fspath(output), wanted, chosen, tell, stop).run(tuned, base)


class _Extraction:
    def __init__(
        self,
        output: str,
        wanted: ExtractOptions,
        options: MergeOptions,
        reporter: Reporter,
        stop: threading.Event | None,
    ) -> None:
        self._wanted = wanted
        self._options = options
        self._tell = reporter
        self._stop = stop or threading.Event()
        self._sink = open_sink(output)
        if isinstance(self._sink, PublishingSink):  # which has no place for the work beside the result
            raise ConfigError(
                "an adapter cannot be written to the Hub",
                where=output,
                remedy="write it to a folder, then upload that: hf upload ORG/NAME FOLDER",
            )
        if options.num_workers is None and options.executor != "ray" and options.address is None:
            # The solver of a matrix works on one thread, so matrices are worked on side by side.
            self._options = replace(options, num_workers=min(_MAX_LOCAL_WORKERS, available_cpus()))

    def run(self, tuned: str | Path, base: str | Path) -> ExtractResult:
        try:
            references = [ModelReference.from_data(text) for text in (tuned, base)]
        except ValueError as error:
            raise ConfigError(
                str(error), remedy="name each model as in a recipe, such as org/name or a folder"
            ) from None
        opened = models_of(open_models(references))
        if len(opened) < 2:
            raise ModelError("the fine-tuned model and its base are the same", where=str(tuned))
        finetuned, original = (opened[reference] for reference in references)
        for warning in check_pair(original, finetuned, allow_conflicts=self._options.allow_config_conflicts):
            self._tell.event("warning", warning)
        found = extraction(finetuned, original, self._wanted.coverage)
        models = {model.reference: model for model in (found.tuned, found.base)}
        digest = self._digest(self._plan("request", [*self._spectra(found), *self._norms(found)], models))
        known = self._look(digest, models)
        if known is not None:
            return known
        ranks = self._ranks(found, models)
        shards = [_shard({target.name: self._factors(found, target, ranks[target.name])}) for target in found.targets]
        told = f"factorising {counted(len(shards), 'matrix', 'matrices')}"
        if found.uncovered:
            told += f", and measuring {counted(len(found.uncovered), 'other tensor')}"
        work, plan = self._work("factors", [*shards, *self._norms(found)], models, told)
        return self._finish(found, work, plan, digest)

    # -- an existing output ---------------------------------------------------------------------------------------

    def _digest(self, request: Plan) -> str:
        """Of all that decides the adapter's bytes."""
        wanted = {**asdict(self._wanted), "dtype": self._wanted.dtype.value}
        text = json.dumps([request.digest, wanted], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _look(self, digest: str, models: Mapping[ModelReference, Model]) -> ExtractResult | None:
        """The result, if it exists already; else the output is free, or is cleared.

        Raises:
            PlanError: the output holds something else.
        """
        read = [checkpoint for model in models.values() for checkpoint in model.weights.inputs.values()]
        check_apart({checkpoint.source.uri: checkpoint.files for checkpoint in read}, self._sink.uri, _OWN_FILES)
        present = {stat.name for stat in self._sink.list() if "/" not in stat.name}
        manifest: dict[str, Any] = {}
        if MANIFEST_FILE in present:
            with contextlib.suppress(ValueError):
                manifest = json.loads(self._sink.read(MANIFEST_FILE, max_bytes=_MAX_MANIFEST_BYTES))
        if manifest.get("extraction_digest") == digest and ADAPTER_CONFIG_NAME in present:
            return from_data(self._sink.uri, manifest["report"])
        resumes = any(stat.name == f"{WORK_FOLDER}/{digest}" for stat in self._sink.list())
        models_there = sorted(n for n in present if n.endswith((".safetensors", ".bin")) and n not in _OWN_FILES)
        foreign = sorted(present & {*_OWN_FILES, "config.json"} | set(models_there))
        if foreign and not resumes:
            if not self._options.overwrite or models_there:
                replacing = "" if models_there else ", or pass `options=MergeOptions(overwrite=True)` to replace it"
                raise PlanError(
                    occupant(manifest, is_finished=True) or files_told(foreign),
                    where=self._sink.uri,
                    remedy=f"choose another output{replacing}",
                )
            self._sink.delete([ADAPTER_CONFIG_NAME])
            self._sink.delete([name for name in _OWN_FILES if name in present])
        self._sink.put(f"{WORK_FOLDER}/{digest}", b"")
        return None

    # -- plans ----------------------------------------------------------------------------------------------------

    def _ranks(self, found: Extraction, models: Mapping[ModelReference, Model]) -> dict[str, int]:
        """The rank of each target: as asked for, or the least that holds the energy."""
        if self._wanted.rank is not None:
            return {target.name: min(self._wanted.rank, found.short_side(target)) for target in found.targets}
        assert self._wanted.energy is not None
        told = f"computing the singular values of {counted(len(found.targets), 'matrix', 'matrices')}"
        work, _ = self._work("spectra", self._spectra(found), models, told)
        spectra = read_small(work, [target.name for target in found.targets])
        return {name: rank_for(np.frombuffer(data, np.float64), self._wanted.energy) for name, data in spectra.items()}

    def _factors(self, found: Extraction, target: Target, rank: int) -> Expression:
        return LowRankFactors(found.difference(target.name), rank, target.transposed, self._wanted.dtype)

    @staticmethod
    def _spectra(found: Extraction) -> list[Shard]:
        return [_shard({t.name: SingularValues(found.difference(t.name))}) for t in found.targets]

    @staticmethod
    def _norms(found: Extraction) -> list[Shard]:
        """What measures the differences that the adapter does not cover, and how large the base is there."""
        return [
            _shard(
                {
                    name: LowRankFactors(found.difference(name), 0),
                    name + BASE_SUFFIX: LowRankFactors(found.base.weights.expression(name), 0),
                },
            )
            for name in found.uncovered
        ]

    def _plan(self, stage: str, shards: Sequence[Shard], models: Mapping[ModelReference, Model]) -> Plan:
        digits = max(5, len(str(len(shards))))
        named = tuple(
            replace(shard, file=f"{stage}-{i:0{digits}}-of-{len(shards):0{digits}}.safetensors")
            for i, shard in enumerate(shards, 1)
        )
        return Plan(
            inputs=inputs_of(models, (tensor.expression for shard in shards for tensor in shard.tensors)),
            shards=named,
            config={},
            side_files=(),
            recipe={"extract_lora": stage},
            seed=0,
        )

    def _work(
        self, stage: str, shards: Sequence[Shard], models: Mapping[ModelReference, Model], message: str
    ) -> tuple[Checkpoint, Plan]:
        """Carry a plan out in its own folder beside the result, and open what it wrote."""
        plan = self._plan(stage, shards, models)
        below = f"{WORK_FOLDER}/{stage}-{plan.digest[:16]}"
        folder = f"{self._sink.uri}/{below}"
        self._tell.event(stage, message, num_tensors=len(shards))
        told = Stage(self._tell, plan, below)
        with told.errors_told():
            run_plan(plan, folder, self._options, reporter=told, stop=self._stop)
        return open_checkpoint(open_source(folder), folder, allow_raw=True), plan

    # -- the adapter ----------------------------------------------------------------------------------------------

    def _finish(self, found: Extraction, work: Checkpoint, plan: Plan, digest: str) -> ExtractResult:
        """Copy what was computed into the adapter's file, and publish it: the config last, which PEFT looks for."""
        report = report_of(self._sink.uri, found, work)
        ranks = {each.name: each.rank for each in report.factorised if each.rank}
        if not ranks:
            raise ModelError(
                f"no matrix differs from {found.base.reference}'s: there is nothing to extract",
                where=f"model {found.tuned.reference}",
                remedy="give the model it was fine-tuned from as base",
            )
        expressions = self._parts(found, work, ranks)
        specs = in_file_order([TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions.items()])
        shard = _laid_out(WEIGHTS_NAME, encode_header(specs), {spec.name: expressions[spec.name] for spec in specs})
        self._copy(replace(plan, inputs=_inputs_with(plan, work), shards=(shard,)), f"{WORK_FOLDER}/{digest}-copy")
        config = adapter_config(found, ranks)
        manifest = {
            "format": 1,
            "extraction_digest": digest,
            "finetuned": str(found.tuned.reference),
            "base": str(found.base.reference),
            "rank": self._wanted.rank,
            "energy": self._wanted.energy,
            "report": to_data(report),
        }
        self._sink.put("README.md", card(found, report).encode())
        self._sink.put(MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
        self._sink.put(ADAPTER_CONFIG_NAME, json.dumps(config, indent=2).encode())
        self._sink.delete([stat.name for stat in self._sink.list() if stat.name.startswith(f"{WORK_FOLDER}/")])
        return report

    def _parts(self, found: Extraction, work: Checkpoint, ranks: Mapping[str, int]) -> dict[str, Expression]:
        """Every tensor of the adapter: a piece of what was computed, or a tensor of the fine-tuned model."""
        parts: dict[str, Expression] = {}
        for target in found.targets:
            if target.name not in ranks:
                continue
            factors = self._factors(found, target, ranks[target.name])
            assert isinstance(factors, LowRankFactors)
            spellings = (
                ("lora_embedding_B", "lora_embedding_A") if target.is_embedding else ("lora_B.weight", "lora_A.weight")
            )
            start = work.tensors[target.name][1].start
            for spelling, shape in zip(spellings, (factors.b_shape, factors.a_shape), strict=True):
                name = f"{found.key(target.module)}.{spelling}"
                spec = TensorSpec(name, DType.F32, shape)
                place = Location(work.tensors[target.name][1].file, start, start + spec.num_bytes)
                load = Load(_WORK_KEY, spec, place)
                parts[name] = load if self._wanted.dtype is DType.F32 else Cast(load, self._wanted.dtype)
                start += spec.num_bytes
        return parts | {found.key(name): found.tuned.weights.expression(name) for name in found.saved}

    def _copy(self, plan: Plan, record_folder: str) -> None:
        """Write the plan's one shard into the output, from this process: it is small."""
        # torch and the rest of the machinery are only paid for once there is something to run.
        from mergekit_ray.evaluation.threads import single_threaded_torch  # noqa: PLC0415
        from mergekit_ray.executors.driver import Job, run_shards  # noqa: PLC0415
        from mergekit_ray.executors.local import LocalExecutor  # noqa: PLC0415
        from mergekit_ray.worker.resources import WorkerOptions  # noqa: PLC0415

        options = WorkerOptions(memory_bytes=comfortable_memory(plan))
        job = Job(inputs=plan.inputs, output=self._sink.uri, record_folder=record_folder, options=options)
        self._tell.begin(plan)
        self._tell.event("adapter", f"writing {WEIGHTS_NAME}")
        with single_threaded_torch():
            run_shards(list(plan.shards), job, LocalExecutor(1), self._tell, self._stop)


def rank_for(values: npt.NDArray[np.float64], energy: float) -> int:
    """The least rank whose singular values hold a share of the squared norm.

    Args:
        values: singular values, largest first.
        energy: the share, above 0 and at most 1.

    Returns:
        0 if all values are zero.
    """
    held = np.cumsum(values**2)
    if held[-1] == 0:
        return 0
    return int(np.searchsorted(held, energy * held[-1])) + 1


def _shard(expressions: Mapping[str, Expression]) -> Shard:
    """A shard of results that are to be named; `_Extraction._plan` names the file."""
    specs = in_file_order([TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions.items()])
    return _laid_out("", encode_header(specs), {spec.name: expressions[spec.name] for spec in specs})


def _laid_out(file: str, header: bytes, expressions: Mapping[str, Expression]) -> Shard:
    tensors, offset = [], 0
    for name, expression in expressions.items():
        spec = TensorSpec(name, expression.spec.dtype, expression.spec.shape)
        tensors.append(OutputTensor(spec, expression, offset, offset + spec.num_bytes))
        offset += spec.num_bytes
    return Shard(file, header, tuple(tensors))


def _inputs_with(plan: Plan, work: Checkpoint) -> dict[str, InputModel]:
    """The inputs of a plan, and the folder of what was computed."""
    files = {name: InputFile(name, stat.num_bytes, stat.version) for name, stat in work.files.items()}
    return {**plan.inputs, _WORK_KEY: InputModel(_WORK_KEY, work.reference, work.source.uri, files)}
