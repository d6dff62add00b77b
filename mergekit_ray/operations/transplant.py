"""`transplant`: a model gets another one's tokenizer, and rows for the tokens that it lacks."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.transplant import TransplantOptions
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.planned_transplant import planned
from mergekit_ray.operations.run_plan import MergeResult, run_plan
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.showing import visible


def transplant(
    model: str | Path,
    donor: str | Path,
    output: str | Path,
    wanted: TransplantOptions | None = None,
    options: MergeOptions | None = None,
    *,
    progress: bool = True,
    reporter: Reporter | None = None,
    stop: threading.Event | AbstractContextManager[threading.Event] | None = None,
) -> MergeResult:
    """Give a model another one's tokenizer, and publish the result.

    Rows of tokens that both have are carried over, the others are approximated. All other tensors are copied.

    Args:
        model: as a recipe names it.
        donor: whose tokenizer it gets; it may be of another family and size.
        output: folder or URI.
        wanted: how rows are made.
        options: how to run it.
        progress: without a reporter, show a live bar in a notebook or on a terminal.
        reporter: told what happens in its place (`reporting.reporters.Reporter`).
        stop: set it from another thread to stop; running it again resumes. A context gives its event from the moment
            on that something is written.

    Returns:
        Where the model is, and what was done.

    Raises:
        MergekitRayError: nothing is published; finished shards are kept for the next run.
    """
    chosen, wanted = options or MergeOptions(), wanted or TransplantOptions()
    chosen.check()
    try:
        references = [ModelReference.from_data(text) for text in (model, donor)]
    except ValueError as error:
        raise ConfigError(str(error), remedy="name each model as in a recipe, such as org/name or a folder") from None
    if references[0] == references[1]:
        raise ModelError("the model and the donor are the same", where=str(model), remedy="name two models")
    plan = planned(references[0], references[1], open_models(references), wanted)
    with visible(reporter, progress=progress) as tell:
        return run_plan(plan, os.fspath(output), chosen, reporter=tell, stop=stop)
