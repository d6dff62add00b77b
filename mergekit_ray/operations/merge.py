"""`merge`: models are merged as a recipe says, and the result is published."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from mergekit_ray.core.arguments import check_argument, options_or
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.before import parts_of, prepare_parts
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.prepare import Prepared, RecipeLike, checked_recipe
from mergekit_ray.operations.run_plan import MergeResult, run_plan
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
    parts = parts_of(loaded, _said(output))
    targets = [part.place for part in parts if part.place is not None]
    if parts[-1].place is None:
        raise PlanError(
            "no output is named", remedy="name one as the second argument, or write `output: path-or-uri` in the recipe"
        )
    found = prepare_parts(
        parts,
        seed=seed,
        allow_config_conflicts=chosen.allow_config_conflicts,
        unsafe_ignore_tokenizers=chosen.unsafe_ignore_tokenizers,
    )
    prepared = list(zip(found, targets, strict=True))
    with visible(reporter, progress=progress) as tell:
        if len(prepared) == 1:
            return _carry_out(*prepared[0], chosen, tell, stop)
        with stop if isinstance(stop, AbstractContextManager) else nullcontext(stop or threading.Event()) as stopped:
            return [_carry_out(*each, chosen, tell, stopped) for each in prepared][-1]


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


def _said(output: str | Path | None) -> str | None:
    """The output that a caller names.

    Raises:
        ConfigError: it is neither text nor a path.
    """
    if output is None:
        return None
    check_argument("output", output, (str, os.PathLike), "a folder or URI")
    return os.fspath(output)
