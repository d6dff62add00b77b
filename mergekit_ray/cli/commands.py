"""All commands. Only what one needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import gc
import json
from typing import Annotated

import typer

from mergekit_ray.cli import (  # noqa: F401 - they add their commands
    compat,
    merging,
    published,
    shuffling,
    to_safetensors,
    transplanting,
)
from mergekit_ray.cli.app import HELP, app, command
from mergekit_ray.cli.options import (
    AsJson,
    Debug,
    Embeddings,
    Energy,
    Exclude,
    FactorDtype,
    FactorType,
    MethodName,
    ModulesToSave,
    Quiet,
    Rank,
    takes_merge_options,
)
from mergekit_ray.cli.running import (
    OurCommand,
    excludes,
    leaving,
    stop_on_signals,
    told_errors,
)
from mergekit_ray.cli.voice import tell
from mergekit_ray.operations.options import MergeOptions


@command("extract-lora")
@takes_merge_options()
def extract_lora_command(
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The fine-tuned model, named as in a recipe.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that it was tuned from.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A folder or s3://bucket/prefix for the adapter.")],
    *,
    rank: Rank = None,
    energy: Energy = None,
    embeddings: Embeddings = False,
    modules_to_save: ModulesToSave = None,
    exclude: Exclude = None,
    dtype: FactorDtype = FactorType.float32,
    options: MergeOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what FINETUNED learnt beyond BASE as a LoRA adapter.

    PEFT loads the adapter. Prints how much of each change is lost, and every change that the adapter leaves out.
    """
    with (
        told_errors(debug, quiet=quiet or as_json, as_json=as_json, resumes=True) as voice,
        stop_on_signals(voice) as stop,
    ):
        from mergekit_ray.core.dtypes import DType
        from mergekit_ray.operations.extract_lora import extract_lora
        from mergekit_ray.operations.extract_options import ExtractOptions
        from mergekit_ray.operations.extraction_report import lines, to_data
        from mergekit_ray.planning.extraction import Coverage

        coverage = Coverage(embeddings, tuple(modules_to_save or ()), tuple(exclude or ()))
        wanted = ExtractOptions(rank, energy, coverage, DType.parse(dtype.value))
        with voice.reporter() as told:
            found = extract_lora(finetuned, base, output, wanted, options, reporter=told, stop=stop)
        if as_json:
            typer.echo(json.dumps({"uri": found.uri, **to_data(found)}))
        elif not quiet:
            for line in lines(found):
                tell(line, err=False)


@command()
def methods(
    name: MethodName = None,
    *,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all of them as a page of Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """List the merge methods, or show the parameters of one."""
    with told_errors(debug, as_json=as_json and not markdown):
        from mergekit_ray.cli.tables import describe_methods, methods_markdown, print_method, print_methods

        if markdown:
            excludes("--markdown", {"--json": as_json, "NAME": name})
            typer.echo(methods_markdown(), nl=False)
        elif as_json:
            typer.echo(json.dumps(describe_methods(name), indent=2, ensure_ascii=False))
        elif name is None:
            print_methods()
        else:
            print_method(name)


def app_main() -> None:
    """Entry point of ``mergekit-ray``."""
    _calm_collector()
    with leaving():
        app()


def merge_main() -> None:
    """Entry point of ``merge``: ``mergekit-ray merge`` for short."""
    _calm_collector()
    short = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    short.command(cls=OurCommand, context_settings=HELP)(merging.merge)
    with leaving():
        short()


def _calm_collector() -> None:
    """Keep Python's garbage collector from walking the many lasting objects of torch again and again.

    A process that imports torch and ends took 1.45 s of CPU time with the collector's defaults, 1.09 s this way.
    """
    gc.set_threshold(200_000, 20, 100)
