"""Arguments and options of the commands, and what the shell completes of them. Each is declared once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from mergekit_ray.cli.usage import number, one_of, whole
from mergekit_ray.core.version import __version__
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import RESUME, RESUME_CALL


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergekit-ray {__version__}")
        raise typer.Exit


def _complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Merge methods that begin so, with what they do, for the shell's completion."""
    from mergekit_ray.core.registry import METHODS  # finding all of them takes time

    return [(name, METHODS.get(name).summary) for name in METHODS.names() if name.startswith(incomplete)]


def _complete_device(incomplete: str) -> list[str]:
    return [name for name in ("auto", "cpu", "cuda", "cuda:0") if name.startswith(incomplete)]


def _completing(kind: type[StrEnum]) -> Callable[[str], list[str]]:
    return lambda incomplete: [each.value for each in kind if each.value.startswith(incomplete)]


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


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        parser=one_of(LogFormat),
        autocompletion=_completing(LogFormat),
        metavar="[text|json]",
        help="Write text, or one JSON object a line.",
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML recipe: a path, s3://bucket/recipe.yml, or - for standard input.")
]
PublishedModel = Annotated[
    str, typer.Argument(metavar="OUT", help="A published model: a folder, s3://bucket/prefix or hf://org/name.")
]
MethodName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Show this method, with its formula.", autocompletion=_complete_method),
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Warn of unknown keys in the recipe instead of refusing them.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", parser=whole(), metavar="N", help="Seed of all randomness (0 to 2^63 - 1); overrides the recipe's."
    ),
]
Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; errors, too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Rank = Annotated[int | None, typer.Option("--rank", parser=whole(1), metavar="N", help="Rank of every matrix.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        parser=number,
        metavar="SHARE",
        help="Instead of --rank: the least rank that keeps this share of a change's squared norm, such as 0.9.",
    ),
]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Also factorise the embedding and the head.")]
ModulesToSave = Annotated[
    list[str] | None,
    typer.Option("--modules-to-save", metavar="NAME", help="Store modules of this name whole; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="NAME", help="Leave out modules of this name; repeatable.")
]
FactorDtype = Annotated[
    FactorType,
    typer.Option(
        "--dtype",
        parser=one_of(FactorType),
        autocompletion=_completing(FactorType),
        metavar="DTYPE",
        help="Store the factors as float32, bfloat16 or float16.",
    ),
]
_DEVICE: Final = typer.Option(
    "--device",
    metavar="DEVICE",
    help="auto (a GPU if there is one), cpu, cuda, or one GPU by its number: cuda:1.",
    autocompletion=_complete_device,
)
Device = Annotated[str, _DEVICE]
DeviceOrNone = Annotated[str | None, _DEVICE]
AllowNonFinite = Annotated[
    bool, typer.Option("--allow-non-finite", help="Accept NaN and infinities instead of refusing them.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another model at OUT.")]
AllowConfigConflicts = Annotated[
    bool, typer.Option("--allow-config-conflicts", help="Accept models whose configs contradict each other.")
]
UnsafeIgnoreTokenizers = Annotated[
    bool,
    typer.Option("--unsafe-ignore-tokenizers", help="Merge embedding rows even if they belong to different tokens."),
]


def parse_memory(text: str) -> int:
    """Bytes of ``--memory``.

    Raises:
        BadParameter: it is no size.
    """
    from mergekit_ray.config.sizes import parse_size  # pydantic is slow to import

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Memory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        parser=parse_memory,
        metavar="SIZE",
        help="Memory of each worker, such as 4GB (default: what the plan needs).",
    ),
]

MaxShardSize = Annotated[
    int | None,
    typer.Option(
        "--max-shard-size",
        parser=parse_memory,
        metavar="SIZE",
        help="Of an output file (default: 2GB); overrides the recipe's.",
    ),
]

_MERGE_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "executor": (
        Annotated[
            ExecutorName | None,
            typer.Option(
                "--executor",
                parser=one_of(ExecutorName),
                autocompletion=_completing(ExecutorName),
                metavar="[local|ray]",
                help="Run on threads of this process or on Ray (the default inside a Ray job).",
            ),
        ],
        None,
    ),
    "address": (
        Annotated[
            str | None, typer.Option("--address", metavar="HOST:PORT", help="Address of the Ray cluster; implies Ray.")
        ],
        None,
    ),
    "num_workers": (
        Annotated[
            int | None,
            typer.Option(
                "--workers", parser=whole(1), metavar="N", help="Shards processed at once (default: automatic)."
            ),
        ],
        None,
    ),
    "memory_bytes": (Memory, None),
    "device": (Device, "auto"),
    "overwrite": (Overwrite, False),
    "allow_non_finite": (AllowNonFinite, False),
    "allow_config_conflicts": (AllowConfigConflicts, False),
    "unsafe_ignore_tokenizers": (UnsafeIgnoreTokenizers, False),
}
"""Annotation and default of each option that becomes an attribute of `MergeOptions`."""

_FLAGS: Final = {
    **{name: f"--{name.replace('_', '-')}" for name in _MERGE_OPTIONS},
    **{name: f"--{name.replace('_', '-')}" for name in ("seed", "rank", "energy", "byte_match", "magikarp")},
    "num_workers": "--workers",
    "memory_bytes": "--memory",
    "saved": "--modules-to-save",
    "excluded": "--exclude",
}
"""What the command line calls Python's options."""

_PYTHON_OPTION: Final = re.compile(r"`(?P<outer>options=MergeOptions\()?(?P<name>\w+)=(?P<value>[^`]*?)(?(outer)\))`")


def in_flags(text: str) -> str:
    """A message in the words of commands: ``--rank 16`` for `rank=16`, ``--memory 9MB`` for its bytes."""

    def flag(option: re.Match[str]) -> str:
        name, value = option["name"], option["value"].strip("'")
        if name not in _FLAGS:
            return option[0]
        value = "" if value == "True" else value.replace("_000_000", "MB")
        return f"{_FLAGS[name]} {value}".rstrip()

    return _PYTHON_OPTION.sub(flag, text).replace(RESUME_CALL, RESUME)


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
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # what inspect reads
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
