"""`merge`: models are merged as a recipe says, and the result is published."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.core.arguments import check_argument, options_or
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.prepare import RecipeLike, checked_recipe, prepare
from mergekit_ray.operations.run_plan import MergeResult, run_plan
from mergekit_ray.planning.make import check_plannable
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.showing import visible


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
    target = _target_of(loaded, output)
    prepared = prepare(
        loaded,
        seed=seed,
        allow_config_conflicts=chosen.allow_config_conflicts,
        unsafe_ignore_tokenizers=chosen.unsafe_ignore_tokenizers,
    )

    def route(tell: Reporter, kept: KeptRouters) -> Plan:
        return prepared.routed(chosen, kept, tell)

    with visible(reporter, progress=progress) as tell:
        return run_plan(
            prepared.plan,
            target,
            chosen,
            reporter=tell,
            stop=stop,
            route=route if prepared.needs_routing else None,
        )


def _target_of(recipe: DenseRecipe | MoeRecipe, output: str | Path | None) -> str:
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
            "no output is named", remedy="give one after the recipe, or add `output: path-or-uri` to the recipe"
        )
    return path
