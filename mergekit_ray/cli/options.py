"""Arguments and options that several commands take. Each is declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from mergekit_ray.operations.options import MergeOptions


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
PublishedModel = Annotated[
    str, typer.Argument(metavar="OUT", help="A published model: folder, s3://bucket/prefix or hf://org/name.")
]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown keys in the recipe are warnings, not errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of all randomness (0 to 2^63 - 1); overrides the recipe's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Names = list[str] | None
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, or one GPU by its number: cuda:1.")
]
AllowNonFinite = Annotated[
    bool, typer.Option("--allow-non-finite", help="Merge NaN and infinities instead of refusing them.")
]
AllowConfigConflicts = Annotated[
    bool, typer.Option("--allow-config-conflicts", help="Merge models whose configs contradict each other.")
]


def _parse_memory(text: str) -> int:
    """Bytes of ``--memory``.

    Raises:
        BadParameter: it is no size.
    """
    from mergekit_ray.config.sizes import parse_size  # pydantic is slow to import

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_MERGE_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "executor": (
        Annotated[
            ExecutorName | None,
            typer.Option("--executor", help="Threads of this process, or Ray (the default inside a Ray job)."),
        ],
        None,
    ),
    "address": (Annotated[str | None, typer.Option("--address", help="Address of the Ray cluster.")], None),
    "num_workers": (
        Annotated[int | None, typer.Option("--workers", min=1, help="Shards processed at once (default: automatic).")],
        None,
    ),
    "memory_bytes": (
        Annotated[
            int | None,
            typer.Option(
                "--memory",
                parser=_parse_memory,
                metavar="SIZE",
                help="Memory of each worker, e.g. 4GB (default: what the plan needs).",
            ),
        ],
        None,
    ),
    "device": (Device, "auto"),
    "overwrite": (Annotated[bool, typer.Option("--overwrite", help="Replace another model at OUT.")], False),
    "allow_non_finite": (AllowNonFinite, False),
    "allow_config_conflicts": (AllowConfigConflicts, False),
}
"""Annotation and default of each option that becomes an attribute of `MergeOptions`."""


def takes_merge_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: give a command, in the place of its parameter ``options: MergeOptions``, the options that make one.

    Args:
        defaults: of options, where they are other than the usual ones.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name != "options":
                parameters.append(parameter)
                continue
            parameters += [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default), annotation=annotation
                )
                for name, (annotation, default) in _MERGE_OPTIONS.items()
            ]

        @functools.wraps(command)
        def wrapped(*args: Any, **given: Any) -> None:
            chosen = {name: given.pop(name) for name in _MERGE_OPTIONS}
            command(*args, options=MergeOptions(**chosen), **given)

        # What typer reads: the signature, and the annotations with the names evaluated.
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
