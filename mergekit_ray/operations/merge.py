"""`merge`: models are merged as a recipe says, and the result is published."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from mergekit_ray.config.load import Recipe
from mergekit_ray.config.stages import StagedRecipe
from mergekit_ray.core.arguments import check_argument, options_or
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.prepare import Prepared, RecipeLike, checked_recipe, prepare
from mergekit_ray.operations.run_plan import MergeResult, run_plan
from mergekit_ray.output.places import below, check_apart
from mergekit_ray.planning.make import check_plannable
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.showing import visible
from mergekit_ray.storage.opening import open_sink


def merge(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    options: MergeOptions | None = None,
    progress: bool = True,
    reporter: Reporter | None = None,
    stop: threading.Event | AbstractContextManager[threading.Event] | None = None,
) -> MergeResult:
    """Merge models as a recipe says and publish the result.

    Args:
        recipe: a recipe, or whatever `mergekit_ray.load_recipe` takes.
        output: folder or URI; None for the recipe's own ``output``.
        seed: of all randomness; overrides the recipe's.
        device: to compute on; overrides that of the options.
        options: how to run it.
        progress: without a reporter, show a live bar in a notebook or on a terminal.
        reporter: told what happens in its place, a `mergekit_ray.Reporter`.
        stop: set it from another thread to stop the merge; running it again resumes. A context gives its event from
            the moment on that something is written.

    Returns:
        Where the model is, and what was done.

    Raises:
        MergekitRayError: nothing is published; finished shards are kept for the next run.
    """
    loaded = checked_recipe(recipe)
    chosen = options_or(MergeOptions(), options)
    if device is not None:
        chosen = replace(chosen, device=device)
    chosen.check()
    wanted = [(loaded, _target_of(loaded, output))]
    if isinstance(loaded, StagedRecipe):
        wanted = [*((loaded.upto(stage), str(stage.output.path)) for stage in loaded.written), *wanted]
    prepared = [
        (
            prepare(
                part,
                seed=seed,
                allow_config_conflicts=chosen.allow_config_conflicts,
                unsafe_ignore_tokenizers=chosen.unsafe_ignore_tokenizers,
            ),
            target,
        )
        for part, target in wanted
    ]
    _check_outputs(prepared)
    with visible(reporter, progress=progress) as tell:
        if len(prepared) == 1:
            return _carry_out(*prepared[0], chosen, tell, stop)
        with stop if isinstance(stop, AbstractContextManager) else nullcontext(stop or threading.Event()) as stopped:
            return [_carry_out(*each, chosen, tell, stopped) for each in prepared][-1]


def _check_outputs(prepared: Sequence[tuple[Prepared, str]]) -> None:
    """Check that no stage's output is another's, or an input of one.

    Raises:
        PlanError: naming it, before anything is written.
    """
    places = [open_sink(target).uri for _, target in prepared] if len(prepared) > 1 else []
    for i, place in enumerate(places):
        if place in places[:i]:
            raise PlanError("two stages have the same output", where=place, remedy="give each a place of its own")
        for earlier in places[:i]:
            if below(place, earlier) is not None or below(earlier, place) is not None:
                raise PlanError(
                    f"the output of a stage is inside that of another, {earlier}",
                    where=place,
                    remedy="give each a place beside the other",
                )
        for other, _ in prepared:
            check_apart({model.uri: model.files for model in other.plan.inputs.values()}, place)


def _carry_out(
    prepared: Prepared,
    target: str,
    options: MergeOptions,
    tell: Reporter,
    stop: threading.Event | AbstractContextManager[threading.Event] | None,
) -> MergeResult:
    def route(tell: Reporter, kept: KeptRouters) -> Plan:
        return prepared.routed(options, kept, tell)

    needed = route if prepared.needs_routing else None
    return run_plan(prepared.plan, target, options, reporter=tell, stop=stop, route=needed)


def _target_of(recipe: Recipe, output: str | Path | None) -> str:
    """Where the result goes: ``output``, or what the recipe says.

    Raises:
        ConfigError: ``output`` is neither text nor a path.
        PlanError: neither names a place, or the recipe is of a kind that cannot be merged.
    """
    if output is not None:
        check_argument("output", output, (str, os.PathLike), "a folder or URI")
        return os.fspath(output)
    path = check_plannable(recipe).output.path
    if path is None:
        raise PlanError(
            "no output is named", remedy="name one as the second argument, or write `output: path-or-uri` in the recipe"
        )
    return path
