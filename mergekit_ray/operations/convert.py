"""`convert`: a model is written as safetensors, whatever form its weights have."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mergekit_ray.core.arguments import check_argument
from mergekit_ray.operations.merge import merge
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import MergeResult
from mergekit_ray.reporting.reporters import Reporter


def convert(
    model: str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    max_shard_size: int | str | None = None,
    progress: bool = True,
    reporter: Reporter | None = None,
    stop: threading.Event | AbstractContextManager[threading.Event] | None = None,
) -> MergeResult:
    """Write a model as safetensors, with its config, tokenizer and what else is beside it.

    It is the `passthrough` merge of the model alone. Each tensor keeps its dtype and its bits. Weights that the config
    ties are written once, as transformers does.

    Args:
        model: as a recipe names it. Its weights may be pickled: nothing of them is run.
        output: folder or URI.
        options: how to run it.
        max_shard_size: of an output file, in bytes or as text such as ``2GB``; None for the default of recipes.
        progress: without a reporter, show a live bar in a notebook or on a terminal.
        reporter: told what happens in its place (`reporting.reporters.Reporter`).
        stop: set it from another thread to stop; running it again resumes. A context gives its event from the moment
            on that something is written.

    Returns:
        Where the model is, and what was done.

    Raises:
        MergekitRayError: nothing is published; finished shards are kept for the next run.
    """
    check_argument("model", model, (str, os.PathLike), "a folder or URI")
    check_argument("output", output, (str, os.PathLike), "a folder or URI")
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": os.fspath(model)}]}
    if max_shard_size is not None:
        recipe["output"] = {"max_shard_size": max_shard_size}
    return merge(recipe, output, options=options, progress=progress, reporter=reporter, stop=stop)
