"""Arguments and options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class ExecutorName(StrEnum):
    """Where shards run."""

    local = "local"
    ray = "ray"


class FactorType(StrEnum):
    """What an adapter's factors are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LogFormat(StrEnum):
    """How progress is written."""

    text = "text"
    json = "json"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML recipe: a path, or s3://bucket/recipe.yml.")
]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown keys in the recipe are warnings, not errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all randomness; overrides the recipe's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Executor = Annotated[
    ExecutorName | None,
    typer.Option("--executor", help="Threads of this process, or Ray (the default inside a Ray job)."),
]
Address = Annotated[str | None, typer.Option("--address", help="Address of the Ray cluster.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Shards in work at a time; else what suits.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Budget of each worker, e.g. 4GB; else what the plan needs.")
]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda, or one of them as cuda:1.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another model at OUT.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Names = list[str] | None
