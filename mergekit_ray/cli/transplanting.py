"""The command `transplant`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Final

import typer

from mergekit_ray.cli.app import command
from mergekit_ray.cli.options import Debug, LogFormat, LogFormatOption, Quiet, parse_memory, takes_merge_options
from mergekit_ray.cli.running import told_errors
from mergekit_ray.cli.usage import number, one_of, whole
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import listening

_PLACES: Final = "[no|embed|lm_head|yes]"


class Where(StrEnum):
    """For which tensors tokens are matched in another way."""

    no = "no"
    embed = "embed"
    lm_head = "lm_head"
    yes = "yes"


def _complete_method(incomplete: str) -> list[str]:
    from mergekit_ray.config.transplant import methods  # finding all of them takes time

    return [name for name in methods() if name.startswith(incomplete)]


@command("transplant")
@takes_merge_options(device="cpu")
def transplant_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model, named as in a recipe.")],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="The model whose tokenizer it gets.")],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder, s3://bucket/prefix or hf://org/name for the result.")
    ],
    *,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How rows of missing tokens are made: omp, common_interpolation, subword, landmark_pca, mean, zero, "
            "randn or john_hewitt.",
            autocompletion=_complete_method,
        ),
    ] = "omp",
    k: Annotated[
        int | None,
        typer.Option("--k", parser=whole(1), metavar="N", help="Shared tokens that a row is made of (default: 64)."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Of common_interpolation: euclidean or cosine.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="NAME",
            help="Of common_interpolation: distance_proportional, barycentric or least_squares.",
        ),
    ] = None,
    subword: Annotated[
        str,
        typer.Option("--subword", metavar="NAME", help="Of subword: mean, sum, weighted_mean or first_last."),
    ] = "mean",
    prefix_match: Annotated[
        Where,
        typer.Option(
            "--prefix-match",
            metavar=_PLACES,
            help="Give a missing token the row of the longest token that it begins with.",
        ),
    ] = Where.no,
    byte_match: Annotated[
        Where,
        typer.Option(
            "--byte-match",
            parser=one_of(Where),
            metavar=_PLACES,
            help="Take tokens for one byte as the same, however they are written.",
        ),
    ] = Where.no,
    magikarp: Annotated[
        bool, typer.Option("--magikarp", help="Leave out shared tokens that were hardly trained.")
    ] = False,
    scale: Annotated[
        float, typer.Option("--new-vocab-scale", parser=number, metavar="FACTOR", help="Scale approximated rows.")
    ] = 1.0,
    noise: Annotated[
        float,
        typer.Option("--new-vocab-noise", parser=number, metavar="STD", help="Add normal noise to approximated rows."),
    ] = 0.0,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            "--max-shard-size",
            parser=parse_memory,
            metavar="SIZE",
            help="Of an output file (default: 2GB).",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", parser=whole(0), metavar="N", help="Seed of random rows and of noise.")
    ] = 0,
    options: MergeOptions,
    quiet: Quiet = False,
    log_format: LogFormatOption = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Give MODEL the tokenizer of DONOR, as a new model at OUT.

    Embedding and head rows of tokens that both have are carried over. Those of the others are approximated.
    """
    with (
        told_errors(debug, quiet=quiet, log_format=log_format, resumes=True) as voice,
        listening(voice.say) as signals,
    ):
        from mergekit_ray.config.transplant import TransplantOptions
        from mergekit_ray.operations.transplant import transplant

        wanted = TransplantOptions(
            method=method,
            k=k,
            metric=metric,
            weights=weights,
            subword=subword,
            prefix_match=prefix_match.value,
            byte_match=byte_match.value,
            magikarp=magikarp,
            scale=scale,
            noise=noise,
            seed=seed,
            **({} if max_shard_size is None else {"max_shard_size": max_shard_size}),
        )
        with voice.reporter() as told:
            result = transplant(model, donor, output, wanted, options, reporter=told, stop=signals.graceful())
        if not quiet and log_format is LogFormat.text and not (sys.stdout.isatty() and sys.stderr.isatty()):
            typer.echo(result.uri)
