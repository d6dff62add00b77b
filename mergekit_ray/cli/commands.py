"""The commands. Only what one needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Annotated, Final

import typer

from mergekit_ray.cli.options import (
    AllowConfigConflicts,
    AllowNonFinite,
    AsJson,
    Debug,
    DeviceOrNone,
    Embeddings,
    Energy,
    Exclude,
    FactorDtype,
    FactorType,
    Lenient,
    LogFormat,
    LogFormatOption,
    MethodName,
    ModulesToSave,
    PublishedModel,
    Quiet,
    Rank,
    RecipeArgument,
    Seed,
    UnsafeIgnoreTokenizers,
    Version,
    takes_merge_options,
)
from mergekit_ray.cli.running import (
    OurCommand,
    OurGroup,
    excludes,
    leaving,
    load,
    needs,
    stop_on_signals,
    told_errors,
)
from mergekit_ray.cli.usage import whole
from mergekit_ray.cli.voice import tell
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import listening

_HELP: Final = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=OurGroup,
    no_args_is_help=True,
    context_settings=_HELP,
    rich_markup_mode=None,  # click's plain help: the boxes leave half of 80 columns for the text
    pretty_exceptions_enable=False,
)
_command = partial(app.command, cls=OurCommand)


@app.callback()
def main(*, version: Version = False) -> None:
    """Merge LLM checkpoints of any size, on one machine or a Ray cluster.

    Reads mergekit's YAML recipes. Start with `validate`, estimate with `plan`, then run `merge`.
    """
    del version


@_command()
@takes_merge_options()
def merge(
    recipe: RecipeArgument,
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="A folder, s3://bucket/prefix or hf://org/name (default: the recipe's `output`)."
        ),
    ] = None,
    *,
    options: MergeOptions,
    seed: Seed = None,
    lenient: Lenient = False,
    quiet: Quiet = False,
    log_format: LogFormatOption = LogFormat.text,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Merge models as RECIPE says and publish the result at OUT.

    After a failure, run the same command again to resume. If the result is already there, nothing is done.
    """
    del version
    with (
        told_errors(debug, quiet=quiet, log_format=log_format, resumes=True) as voice,
        listening(voice.say) as signals,
    ):
        from mergekit_ray.operations.merge import merge as run

        loaded = load(recipe, voice, lenient=lenient)
        with voice.reporter() as told:
            result = run(loaded, output, seed=seed, options=options, reporter=told, stop=signals.graceful())
        # On a terminal the last event has just said it.
        if not quiet and log_format is LogFormat.text and not (sys.stdout.isatty() and sys.stderr.isatty()):
            typer.echo(result.uri)


@_command("plan")
def plan_command(
    recipe: RecipeArgument,
    *,
    seed: Seed = None,
    lenient: Lenient = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="SPEC", help="Also estimate the time there: nodes=8,link=25Gbit[,store=200Gbit]."
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="NAME", help="Show how this tensor is computed. Takes patterns such as '*.mlp.*'."
        ),
    ] = None,
    device: DeviceOrNone = None,
    allow_non_finite: AllowNonFinite = False,
    allow_config_conflicts: AllowConfigConflicts = False,
    unsafe_ignore_tokenizers: UnsafeIgnoreTokenizers = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would read, write and need.

    Reads the models' headers only. With --explain, shows instead what tensors are made of and how they are computed
    on --device.
    """
    with told_errors(debug, as_json=as_json) as voice:
        if explain is None:
            needs("--explain", {"--device": device, "--allow-non-finite": allow_non_finite})
        else:
            excludes("--explain", {"--cluster": cluster})
        from mergekit_ray.operations.plan import explained, plan
        from mergekit_ray.planning.estimate import Cluster, estimate
        from mergekit_ray.planning.figures import figures

        shape = None if cluster is None else Cluster.parse(cluster)
        loaded = load(recipe, voice, lenient=lenient)
        planned = plan(
            loaded,
            seed=seed,
            routing=False,
            allow_config_conflicts=allow_config_conflicts,
            unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
        )
        if explain is not None:
            found = explained(planned, explain, device=device or "auto", allow_non_finite=allow_non_finite)
            if as_json:
                typer.echo(json.dumps([each.to_json() for each in found]))
                return
            from mergekit_ray.cli.tables import print_explanations

            print_explanations(planned, found)
            return
        expected = None if shape is None else estimate(planned, shape)
        if as_json:
            more = {} if expected is None else {"estimate": asdict(expected)}
            typer.echo(json.dumps({**figures(planned), **more, "plan": planned.to_json()}))
            return
        from mergekit_ray.cli.tables import print_estimate, print_plan

        print_plan(planned)
        if shape is not None and expected is not None:
            print_estimate(shape, expected)


@_command()
def validate(
    recipe: RecipeArgument,
    *,
    lenient: Lenient = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also read the models' headers and check that the models fit together.")
    ] = False,
    allow_config_conflicts: AllowConfigConflicts = False,
    unsafe_ignore_tokenizers: UnsafeIgnoreTokenizers = False,
    debug: Debug = False,
) -> None:
    """Check RECIPE and report every fault in it."""
    with told_errors(debug) as voice:
        from mergekit_ray.config.moe_recipe import MoeRecipe

        if not models:
            flags = {"--unsafe-ignore-tokenizers": unsafe_ignore_tokenizers}
            needs("--models", {"--allow-config-conflicts": allow_config_conflicts, **flags})
        from mergekit_ray.planning.make import check_plannable

        loaded = check_plannable(load(recipe, voice, lenient=lenient))
        kind = "a Mixture-of-Experts recipe" if isinstance(loaded, MoeRecipe) else "a dense recipe"
        if models:
            from mergekit_ray.operations.prepare import prepare
            from mergekit_ray.planning.figures import summary

            prepared = prepare(
                loaded,
                allow_config_conflicts=allow_config_conflicts,
                unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
            )
            prepared.check_routable()
            planned = prepared.plan
            for warning in planned.warnings:
                voice.warn(warning)
            tell(f"{recipe}: {kind}, valid, and its models fit together: {summary(planned)}", err=False)
        else:
            tell(f"{recipe}: {kind}, valid", err=False)


@_command()
def verify(
    out: PublishedModel,
    *,
    sample: Annotated[
        int | None, typer.Option("--sample", parser=whole(0), metavar="N", help="Read only N tensors, drawn at random.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", parser=whole(), metavar="N", help="Seed of the draw for --sample (default: 0)."),
    ] = None,
    finite: Annotated[bool, typer.Option("--finite", help="Also check that no value is NaN or infinite.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every byte of a published model with its manifest.

    Exits with code 3 if anything differs, or if there are files that a reader would load and that are not part of the
    model. An edited model card is allowed. --sample reads some of the weights instead of all; everything else is always
    compared.
    """
    with told_errors(debug, as_json=as_json):
        from mergekit_ray.core.sizes import counted, format_bytes
        from mergekit_ray.operations.verify import VerifyOptions
        from mergekit_ray.operations.verify import verify as run
        from mergekit_ray.storage.opening import open_source

        if sample is None:
            needs("--sample", {"--seed": seed})
        found = run(open_source(out), options=VerifyOptions(sample, seed or 0, finite))
        if as_json:
            typer.echo(json.dumps({**vars(found), "ok": not found.problems}))
        else:
            for line in [*(f"note: {note}" for note in found.notes), *(f"wrong: {what}" for what in found.problems)]:
                tell(line)
            if not found.problems:
                counts = (
                    counted(found.num_shards, "shard"),
                    counted(found.num_tensors, "tensor"),
                    format_bytes(found.num_bytes),
                    counted(found.num_files, "other file"),
                )
                tell(f"{out}: {', '.join(counts)}: all as written", err=False)
        if found.problems:
            raise typer.Exit(3)


@_command()
def attest(
    out: PublishedModel,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model (default: the last part of OUT).", metavar="NAME")
    ] = None,
    debug: Debug = False,
) -> None:
    """Print a statement for OpenSSF model signing.

    It lists the SHA-256 of every file. No weight is read again.
    """
    with told_errors(debug):
        from mergekit_ray.operations.attest import statement
        from mergekit_ray.storage.opening import open_source

        source = open_source(out)
        typer.echo(json.dumps(statement(source, name or source.uri.rstrip("/").rpartition("/")[2]), indent=2))


@_command("reproduce")
@takes_merge_options(device="cpu")
def reproduce_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="mergekit-ray.json, or the model it belongs to.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A folder or s3://bucket/prefix.")],
    *,
    options: MergeOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Repeat the merge in MANIFEST and compare all digests.

    Reads the inputs that MANIFEST pins and checks their sizes and headers, not their content. Compares the digest of
    every shard and tensor of the result. Exits with code 3 if anything differs.
    """
    with (
        told_errors(debug, quiet=quiet or as_json, as_json=as_json, resumes=True) as voice,
        stop_on_signals(voice) as stop,
    ):
        from mergekit_ray.core.sizes import counted
        from mergekit_ray.operations.reproduce import reproduce
        from mergekit_ray.output.manifest import read_manifest

        with voice.reporter() as told:
            found = reproduce(read_manifest(manifest), output, options, reporter=told, stop=stop)
        if as_json:
            typer.echo(json.dumps({**asdict(found), "ok": not found.problems}))
        else:
            for line in [*(f"note: {note}" for note in found.notes), *(f"wrong: {what}" for what in found.problems)]:
                tell(line)
            if not found.problems and not quiet:
                tell(f"{found.uri}: {counted(found.num_shards, 'shard')}, all as the manifest says", err=False)
        if found.problems:
            raise typer.Exit(3)


@_command("extract-lora")
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
        from mergekit_ray.operations.extract_lora import ExtractOptions, extract_lora
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


@_command()
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
    short.command(cls=OurCommand, context_settings=_HELP)(merge)
    with leaving():
        short()


def _calm_collector() -> None:
    """Keep Python's garbage collector from walking the many lasting objects of torch again and again.

    A process that imports torch and ends took 1.45 s of CPU time with the collector's defaults, 1.09 s this way.
    """
    gc.set_threshold(200_000, 20, 100)
