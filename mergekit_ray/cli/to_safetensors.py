"""The command `convert`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mergekit_ray.cli.app import command
from mergekit_ray.cli.options import Debug, LogFormat, LogFormatOption, Quiet, parse_memory, takes_merge_options
from mergekit_ray.cli.running import told_errors
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import listening


@command("convert")
@takes_merge_options(device="cpu")
def convert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model, named as in a recipe.")],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder, s3://bucket/prefix or hf://org/name for the result.")
    ],
    *,
    max_shard_size: Annotated[
        int | None,
        typer.Option("--max-shard-size", parser=parse_memory, metavar="SIZE", help="Of an output file (default: 2GB)."),
    ] = None,
    options: MergeOptions,
    quiet: Quiet = False,
    log_format: LogFormatOption = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Write a model with pickled weights (.bin) as safetensors.

    Nothing of a pickle is run. Every tensor keeps its dtype and its bits; config and tokenizer are copied.
    """
    with (
        told_errors(debug, quiet=quiet, log_format=log_format, resumes=True) as voice,
        listening(voice.say) as signals,
    ):
        from mergekit_ray.operations.convert import convert

        with voice.reporter() as told:
            result = convert(
                model, output, options, max_shard_size=max_shard_size, reporter=told, stop=signals.graceful()
            )
        if not quiet and log_format is LogFormat.text and not (sys.stdout.isatty() and sys.stderr.isatty()):
            typer.echo(result.uri)
