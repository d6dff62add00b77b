"""`mergekit_ray.merge` and `mergekit_ray.plan`: the command line's twins in Python."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from mergekit_ray.checkpoint.adapter import Adapter, adapted, open_adapter
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import is_copy
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.make import check_plannable, make_plan, referenced_models
from mergekit_ray.planning.moe_experts import RouterVectors
from mergekit_ray.planning.windows import check_memory, comfortable_memory
from mergekit_ray.runtime.cluster import wants_ray
from mergekit_ray.runtime.destination import inspect
from mergekit_ray.runtime.device import CPU, check_device, computing_on, resolve
from mergekit_ray.runtime.device_report import DeviceReporter
from mergekit_ray.runtime.lease import discard_dead
from mergekit_ray.runtime.recipes import load_recipe
from mergekit_ray.runtime.reporting import Reporter, SilentReporter
from mergekit_ray.storage.opening import open_sink, open_source

RecipeLike = DenseRecipe | MoeRecipe | Path | str | Mapping[str, Any]

_MAX_LOCAL_THREADS: Final = 8


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run. Of this only ``device`` may change the bytes written, by the last bit of some elements.

    Attributes:
        executor: ``local`` threads, ``ray`` actors, or None: Ray inside a Ray job or when an address is given.
        address: of the Ray cluster.
        num_workers: shards in work at a time; None for `local_workers`, and as many as the CPUs allow on Ray.
        memory_bytes: budget of each worker; None for what the plan needs to overlap its work.
        overwrite: replace another model that is at the output.
        allow_non_finite: let NaN and infinities pass.
        chunk_elements: elements computed at a time on the CPU; None for the default.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, or one of them as ``cuda:1``.
    """

    executor: Literal["local", "ray"] | None = None
    address: str | None = None
    num_workers: int | None = None
    memory_bytes: int | None = None
    overwrite: bool = False
    allow_non_finite: bool = False
    chunk_elements: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did.

    Attributes:
        uri: where the model is.
        plan: what was carried out.
        num_resumed: shards that an earlier run had finished.
        seconds: from planning to publishing.
    """

    uri: str
    plan: Plan
    num_resumed: int
    seconds: float


def open_models(references: list[ModelReference]) -> dict[ModelReference, Checkpoint]:
    """Headers and configs of models and of the adapters on them, fetched concurrently; a shared base only once.

    Raises:
        ModelError, CheckpointError, StorageError: naming the model or the adapter.
    """

    def open_base(reference: ModelReference) -> Checkpoint:
        return open_checkpoint(open_source(reference.path, revision=reference.revision), str(reference))

    def open_one(reference: ModelReference) -> Adapter:
        return open_adapter(open_source(reference.path, revision=reference.revision), str(reference))

    bases = list(dict.fromkeys(replace(reference, lora=None) for reference in references))
    loras = list(dict.fromkeys(reference.lora for reference in references if reference.lora is not None))
    with ThreadPoolExecutor(max_workers=max(1, len(bases) + len(loras))) as executor:
        opened, adapters = executor.map(open_base, bases), executor.map(open_one, loras)
        checkpoint_of = dict(zip(bases, opened, strict=True))
        adapter_of = dict(zip(loras, adapters, strict=True))
    return {
        reference: checkpoint_of[replace(reference, lora=None)]
        if reference.lora is None
        else adapted(checkpoint_of[replace(reference, lora=None)], adapter_of[reference.lora])
        for reference in references
    }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge whose models are open.

    Attributes:
        recipe: with the seed that holds.
        checkpoints: the opened headers of its models.
        plan: everything that would be written, from headers alone. Routers that are made from prompts are zero in it.
    """

    recipe: DenseRecipe | MoeRecipe
    checkpoints: Mapping[ModelReference, Checkpoint]
    plan: Plan

    @property
    def has_prompts(self) -> bool:
        """Whether routers are still to be made, which reads the base model."""
        return isinstance(self.recipe, MoeRecipe) and (self.recipe.add_to_base or self.recipe.gate_mode.needs_prompts)

    def routed(self, options: MergeOptions) -> Plan:
        """The plan with its routers, made where the options say.

        Raises:
            MergekitRayError: see `routing.routers`.
        """
        if not isinstance(self.recipe, MoeRecipe) or not self.has_prompts:
            return self.plan
        return make_plan(self.recipe, self.checkpoints, partial(make_routers, self.recipe, self.checkpoints, options))

    def routed_for(self, output: str, options: MergeOptions, tell: Reporter) -> Plan:
        """The plan to carry out at a place. Routers are made only if the place is free and does not hold the result.

        Raises:
            MergekitRayError: see `inspect` and `routed`.
        """
        if not self.has_prompts or inspect(open_sink(output), self.plan, overwrite=options.overwrite).published:
            return self.plan
        tell.event("routing", f"making the routers, through the layers of {self.recipe.base_model}")
        return self.routed(options)


def prepare(recipe: RecipeLike, *, seed: int | None = None) -> Prepared:
    """Open the models of a merge and plan it, from headers alone.

    Args:
        recipe: a recipe, or whatever `mergekit_ray.load_recipe` takes.
        seed: overrides the recipe's.

    Raises:
        MergekitRayError: the recipe is wrong, or the models are not there or do not fit together.
    """
    loaded = recipe if isinstance(recipe, DenseRecipe | MoeRecipe) else load_recipe(recipe)
    checked = check_plannable(loaded)
    if seed is not None:
        checked = _seeded(checked, seed)
    checkpoints = open_models(referenced_models(checked))
    return Prepared(checked, checkpoints, make_plan(checked, checkpoints))


def plan(recipe: RecipeLike, *, seed: int | None = None, routing: bool = True) -> Plan:
    """Plan a merge: everything that would be written, from headers alone.

    Args:
        recipe: a recipe, or whatever `mergekit_ray.load_recipe` takes.
        seed: overrides the recipe's.
        routing: make the routers of a Mixture of Experts from its prompts, which reads the base model. Without it they
            are zero in the plan: enough to see what would be written, not to write it.

    Raises:
        MergekitRayError: the recipe is wrong, or the models are not there or do not fit together.
    """
    prepared = prepare(recipe, seed=seed)
    return prepared.routed(MergeOptions(executor="local", device=CPU)) if routing else prepared.plan


def _seeded(recipe: DenseRecipe | MoeRecipe, seed: int) -> DenseRecipe | MoeRecipe:
    changed: dict[str, Any] = {"seed": seed}
    if isinstance(recipe, MoeRecipe) and recipe.backbone is not None:
        changed["backbone"] = _seeded(recipe.backbone, seed)
    return recipe.model_copy(update=changed)


def make_routers(
    recipe: MoeRecipe, checkpoints: Mapping[ModelReference, Checkpoint], options: MergeOptions
) -> RouterVectors:
    """The routers of a recipe: new ones, or rows for those that are there; on Ray or here, on the device asked for.

    Raises:
        MergekitRayError: see `routing.routers`.
    """
    # The base model's layers run in transformers, which only recipes with prompts pay for.
    from mergekit_ray.runtime.routing import routers as make  # noqa: PLC0415
    from mergekit_ray.runtime.routing_spread import Here  # noqa: PLC0415

    if recipe.add_to_base:
        from mergekit_ray.runtime.routing_growth import grown_routers as make  # noqa: PLC0415

    if not wants_ray(options.executor, options.address) or not recipe.gate_mode.needs_states:
        return make(recipe, checkpoints, spread=Here(resolve(options.device)))
    from mergekit_ray.runtime.ray_cluster import connected  # noqa: PLC0415
    from mergekit_ray.runtime.ray_routing import OnRay  # noqa: PLC0415

    with connected(options.address):
        return make(recipe, checkpoints, spread=OnRay.now(options.device, options.num_workers))


def merge(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    options: MergeOptions | None = None,
    reporter: Reporter | None = None,
    stop: threading.Event | None = None,
) -> MergeResult:
    """Merge models as a recipe says and publish the result.

    Args:
        recipe: a recipe, or whatever `mergekit_ray.load_recipe` takes.
        output: folder or URI; None for the recipe's own ``output``.
        seed: of all randomness; overrides the recipe's.
        device: to compute on; overrides that of the options.
        options: how to run it.
        reporter: told what happens (`runtime.reporting.Reporter`); None for silence.
        stop: set it from another thread to stop the merge; running it again resumes.

    Returns:
        Where the model is, and what was done.

    Raises:
        MergekitRayError: nothing is published; finished shards are kept for the next run.
    """
    loaded = recipe if isinstance(recipe, DenseRecipe | MoeRecipe) else load_recipe(recipe)
    chosen = options or MergeOptions()
    if device is not None:
        chosen = replace(chosen, device=check_device(device))
    target = target_of(loaded, output)
    planned = prepare(loaded, seed=seed).routed_for(target, chosen, reporter or SilentReporter())
    return run_plan(planned, target, chosen, reporter=reporter, stop=stop)


def target_of(recipe: DenseRecipe | MoeRecipe, output: str | Path | None) -> str:
    """Where the result goes: ``output``, or what the recipe says.

    Raises:
        PlanError: neither names a place, or the recipe is of a kind that cannot be merged.
    """
    if output is not None:
        return str(output)
    path = check_plannable(recipe).output.path
    if path is None:
        raise PlanError(
            "no output is named", remedy="give one after the recipe, or add `output: path-or-uri` to the recipe"
        )
    return path


def run_plan(
    planned: Plan,
    output: str,
    options: MergeOptions,
    *,
    reporter: Reporter | None = None,
    stop: threading.Event | None = None,
) -> MergeResult:
    """Carry a plan out: write its shards, check them, publish. See `merge`."""
    check_device(options.device)
    memory_bytes = options.memory_bytes or comfortable_memory(planned)
    check_memory(planned, memory_bytes)
    began = time.perf_counter()
    tell = reporter or SilentReporter()
    destination = inspect(open_sink(output), planned, overwrite=options.overwrite)
    uri = destination.sink.uri
    if destination.published:
        discard_dead(destination.sink)
        tell.event("already_done", f"{uri} already holds the result of this plan", uri=uri)
    else:
        # torch and the rest of the machinery are only paid for once there is something to run.
        from mergekit_ray.runtime.run import carry_out  # noqa: PLC0415

        options = replace(options, memory_bytes=memory_bytes)
        with computing_on(options.device):
            carry_out(planned, destination, options, DeviceReporter(tell), stop or threading.Event())
        tell.event("published", f"{uri} is complete", uri=uri, seconds=round(time.perf_counter() - began, 3))
    return MergeResult(uri, planned, len(destination.done), time.perf_counter() - began)


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def local_workers(plan: Plan) -> int:
    """Local workers for a plan: one, whose threads compute together; two where most of the output is copied.

    A copy is bound by what each worker does with one thread, hashing and writing.
    """
    num_copied = sum(
        tensor.spec.num_bytes for shard in plan.shards for tensor in shard.tensors if is_copy(tensor.expression)
    )
    return 2 if num_copied > plan.num_bytes / 2 and available_cpus() > 1 else 1


def local_threads(num_workers: int) -> int:
    """Compute threads of each of ``num_workers`` local workers: together no more than there are CPUs."""
    return max(1, min(_MAX_LOCAL_THREADS, available_cpus() // num_workers))
