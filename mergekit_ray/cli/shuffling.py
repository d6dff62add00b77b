"""Commands that write recipes: `recipe shuffle`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergekit_ray.cli.app import HELP, app
from mergekit_ray.cli.options import Debug
from mergekit_ray.cli.running import OurCommand, OurGroup, told_errors
from mergekit_ray.cli.usage import number, whole

recipes = typer.Typer(cls=OurGroup, no_args_is_help=True, context_settings=HELP, rich_markup_mode=None)
app.add_typer(recipes, name="recipe")


@recipes.callback()
def recipe() -> None:
    """Print a recipe for `merge`."""


def _dtype(text: str) -> str:
    from mergekit_ray.core.dtypes import DType

    try:
        return DType.parse(text).config_name
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@recipes.command("shuffle", cls=OurCommand)
def shuffle_command(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="MODEL", help="A model, named as in a recipe; repeatable."),
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            "--weight", "-w", parser=number, metavar="W", help="How likely the model at the same place is drawn."
        ),
    ] = None,
    *,
    seed: Annotated[int, typer.Option("--seed", parser=whole(0), metavar="N", help="Seed of the draw.")] = 0,
    full_random: Annotated[
        bool, typer.Option("--full-random", help="Draw the layer's index, too; else every layer keeps its place.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", parser=_dtype, metavar="DTYPE", help="Of the result (default: that of the models)."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print a recipe of layers drawn from several models.

    `mergekit-ray recipe shuffle -m A -m B | merge - OUT` merges it.
    """
    with told_errors(debug):
        from mergekit_ray.operations.shuffle import shuffle

        found = shuffle(models or (), weights or (), seed=seed, full_random=full_random, dtype=dtype)
        typer.echo(found.to_yaml(), nl=False)
