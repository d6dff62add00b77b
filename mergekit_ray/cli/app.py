"""The application that the commands are added to."""

from __future__ import annotations

from functools import partial
from typing import Final

import typer

from mergekit_ray.cli.options import Version
from mergekit_ray.cli.running import OurCommand, OurGroup

HELP: Final = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=OurGroup,
    no_args_is_help=True,
    context_settings=HELP,
    rich_markup_mode=None,  # click's plain help: the boxes leave half of 80 columns for the text
    pretty_exceptions_enable=False,
)
command = partial(app.command, cls=OurCommand)


@app.callback()
def main(*, version: Version = False) -> None:
    """Merge LLM checkpoints of any size, on one machine or a Ray cluster.

    Reads mergekit's YAML recipes. Start with `validate`, estimate with `plan`, then run `merge`.
    """
    del version
