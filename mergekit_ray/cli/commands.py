"""The commands. Only what one needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from typing import Annotated

import typer

from mergekit_ray.cli.options import (
    AllowConfigConflicts,
    AllowNonFinite,
    AsJson,
    Debug,
    Device,
    FactorType,
    Lenient,
    LogFormat,
    Names,
    PublishedModel,
    Quiet,
    RecipeArgument,
    Seed,
    takes_merge_options,
)
from mergekit_ray.cli.running import (
    DiscreetCommand,
    DiscreetGroup,
    excludes,
    leaving,
    load,
    needs,
    reporter,
    say,
    stop_on_signals,
    told_errors,
)
from mergekit_ray.core.version import __version__
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import listening

app = typer.Typer(cls=DiscreetGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergekit-ray {__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Merge language-model checkpoints across a cluster. Reads mergekit's YAML."""
    del version


@app.command()
@takes_merge_options()
def merge(
    recipe: RecipeArgument,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="Folder, s3://bucket/prefix or hf://org/name; else the recipe's `output`."),
    ] = None,
    *,
    options: MergeOptions,
    seed: Seed = None,
    lenient: Lenient = False,
    quiet: Quiet = False,
    log_format: Annotated[LogFormat, typer.Option("--log-format", help="Lines of text, or of JSON.")] = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Merge models as RECIPE says and publish the result at OUT.

    Running the same command again after a failure resumes; when the result is there already, nothing is done.
    """
    with told_errors(debug), listening(say) as signals:
        from mergekit_ray.operations.merge import merge as run

        loaded = load(recipe, lenient=lenient, quiet=quiet)
        with reporter(quiet=quiet, log_format=log_format) as told:
            result = run(loaded, output, seed=seed, options=options, reporter=told, stop=signals.graceful())
        if not quiet and log_format is LogFormat.text:
            typer.echo(result.uri)


@app.command("plan")
def plan_command(
    recipe: RecipeArgument,
    *,
    seed: Seed = None,
    lenient: Lenient = False,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Also how long it takes there: nodes=8,link=25Gbit[,store=200Gbit].")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="NAME", help="How a tensor is computed; a pattern such as '*.mlp.*' too."),
    ] = None,
    device: Device | None = None,
    allow_non_finite: AllowNonFinite = False,
    allow_config_conflicts: AllowConfigConflicts = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would read, write and need, without reading a weight.

    With --explain, show instead what tensors are made of and how they are computed on --device.
    """
    with told_errors(debug):
        if explain is None:
            needs("--explain", {"--device": device, "--allow-non-finite": allow_non_finite})
        else:
            excludes("--explain", {"--cluster": cluster})
        from mergekit_ray.operations.plan import explained, plan
        from mergekit_ray.planning.estimate import Cluster, estimate
        from mergekit_ray.planning.figures import figures

        shape = None if cluster is None else Cluster.parse(cluster)
        loaded = load(recipe, lenient=lenient)
        planned = plan(loaded, seed=seed, routing=False, allow_config_conflicts=allow_config_conflicts)
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


@app.command()
def validate(
    recipe: RecipeArgument,
    *,
    lenient: Lenient = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also open the models' headers and see that they fit together.")
    ] = False,
    allow_config_conflicts: AllowConfigConflicts = False,
    debug: Debug = False,
) -> None:
    """Check RECIPE and report everything that is wrong with it."""
    with told_errors(debug):
        from mergekit_ray.config.moe_recipe import MoeRecipe

        if not models:
            needs("--models", {"--allow-config-conflicts": allow_config_conflicts})
        loaded = load(recipe, lenient=lenient)
        kind = "a Mixture-of-Experts recipe" if isinstance(loaded, MoeRecipe) else "a dense recipe"
        if models:
            from mergekit_ray.operations.prepare import prepare
            from mergekit_ray.planning.figures import summary

            prepared = prepare(loaded, allow_config_conflicts=allow_config_conflicts)
            prepared.check_routable()
            planned = prepared.plan
            for warning in planned.warnings:
                typer.echo(f"warning: {warning}", err=True)
            typer.echo(f"{recipe}: {kind}, valid, and its models fit together: {summary(planned)}")
        else:
            typer.echo(f"{recipe}: {kind}, valid")


@app.command()
def verify(
    out: PublishedModel,
    *,
    sample: Annotated[
        int | None, typer.Option("--sample", min=0, help="Read so many tensors only, drawn at random.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of that draw (default: 0).")] = None,
    finite: Annotated[bool, typer.Option("--finite", help="Also see that no value read is NaN or infinite.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read a published model again and compare every byte with its manifest. Exit code 3 if something differs.

    Files that do not belong to it and that readers would load count as well, an edited model card does not. Everything
    but the weights is always compared; --sample spares reading all of these.
    """
    with told_errors(debug):
        from mergekit_ray.core.sizes import format_bytes
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
                typer.echo(line, err=True)
            if not found.problems:
                typer.echo(
                    f"{out}: {found.num_shards} shards, {found.num_tensors} tensors, {format_bytes(found.num_bytes)}, "
                    f"{found.num_files} other files: all as written"
                )
        if found.problems:
            raise typer.Exit(3)


@app.command()
def attest(
    out: PublishedModel,
    *,
    name: Annotated[str | None, typer.Option("--name", help="Of the model; else the last part of OUT.")] = None,
    debug: Debug = False,
) -> None:
    """Print what OpenSSF's model signing signs: the SHA-256 of every file. No weight is read again."""
    with told_errors(debug):
        from mergekit_ray.operations.attest import statement
        from mergekit_ray.storage.opening import open_source

        source = open_source(out)
        typer.echo(json.dumps(statement(source, name or source.uri.rstrip("/").rpartition("/")[2]), indent=2))


@app.command("reproduce")
@takes_merge_options(device="cpu")
def reproduce_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="mergekit-ray.json, or the model it lies in.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix.")],
    *,
    options: MergeOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge again what MANIFEST describes, from the inputs it pins, and compare all digests.

    Inputs are compared by size and header, not by content; of the result, every shard and tensor by its digest. Exit
    code 3 if anything differs; a note, if an input is of another version with the same size and header.
    """
    with told_errors(debug), stop_on_signals() as stop:
        from mergekit_ray.operations.reproduce import reproduce
        from mergekit_ray.output.manifest import read_manifest

        with reporter(quiet=quiet or as_json) as told:
            found = reproduce(read_manifest(manifest), output, options, reporter=told, stop=stop)
        if as_json:
            typer.echo(json.dumps({**asdict(found), "ok": not found.problems}))
        else:
            for line in [*(f"note: {note}" for note in found.notes), *(f"wrong: {what}" for what in found.problems)]:
                typer.echo(line, err=True)
            if not found.problems and not quiet:
                typer.echo(f"{found.uri}: {found.num_shards} shards, all as the manifest says")
        if found.problems:
            raise typer.Exit(3)


@app.command("extract-lora")
@takes_merge_options()
def extract_lora_command(
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The fine-tuned model, as in a recipe.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it was tuned from.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix of the adapter.")],
    *,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of every matrix.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or: least ranks that hold this share, e.g. 0.9.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also factorise embeddings and head.")] = False,
    modules_to_save: Annotated[
        Names, typer.Option(metavar="NAME", help="Store modules so named whole; repeatable.")
    ] = None,
    exclude: Annotated[Names, typer.Option(metavar="NAME", help="Leave modules so named out; repeatable.")] = None,
    dtype: Annotated[FactorType, typer.Option("--dtype", help="What the factors are stored in.")] = FactorType.float32,
    options: MergeOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what FINETUNED learnt beyond BASE as a LoRA adapter that PEFT loads.

    Prints how much of each difference the adapter holds, and every difference that it does not.
    """
    with told_errors(debug), stop_on_signals() as stop:
        from mergekit_ray.core.dtypes import DType
        from mergekit_ray.operations.extract_lora import ExtractOptions, extract_lora
        from mergekit_ray.operations.extraction_report import lines, to_data
        from mergekit_ray.planning.extraction import Coverage

        coverage = Coverage(embeddings, tuple(modules_to_save or ()), tuple(exclude or ()))
        wanted = ExtractOptions(rank, energy, coverage, DType.parse(dtype.value))
        with reporter(quiet=quiet or as_json) as told:
            found = extract_lora(finetuned, base, output, wanted, options, reporter=told, stop=stop)
        if as_json:
            typer.echo(json.dumps({"uri": found.uri, **to_data(found)}))
        elif not quiet:
            for line in lines(found):
                typer.echo(line)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with its formula.")] = None,
    *,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as a page of Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """List the merge methods, or show the parameters of one."""
    with told_errors(debug):
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
    short = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    short.command(cls=DiscreetCommand)(merge)
    with leaving():
        short()


def _calm_collector() -> None:
    """Keep Python's garbage collector from walking the many lasting objects of torch again and again.

    A process that imports torch and ends took 1.45 s of CPU time with the collector's defaults, 1.09 s this way.
    """
    gc.set_threshold(200_000, 20, 100)
