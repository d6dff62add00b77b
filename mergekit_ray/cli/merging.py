"""Commands on recipes: `merge`, `plan`, `validate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from mergekit_ray.cli.app import command
from mergekit_ray.cli.options import (
    AllowConfigConflicts,
    AllowNonFinite,
    AsJson,
    Debug,
    DeviceOrNone,
    Lenient,
    LogFormat,
    LogFormatOption,
    MaxShardSize,
    Memory,
    Quiet,
    RecipeArgument,
    Seed,
    UnsafeIgnoreTokenizers,
    Version,
    in_flags,
    takes_merge_options,
)
from mergekit_ray.cli.running import (
    excludes,
    load,
    needs,
    told_errors,
)
from mergekit_ray.cli.voice import tell
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.reporting.signals import listening


@command()
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
    max_shard_size: MaxShardSize = None,
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
        from mergekit_ray.operations.recipes import with_shard_size

        loaded = load(recipe, voice.warn, lenient=lenient)
        if max_shard_size is not None:
            loaded = with_shard_size(loaded, max_shard_size)
        with voice.reporter() as told:
            result = run(loaded, output, seed=seed, options=options, reporter=told, stop=signals.graceful())
        # On a terminal the last event has just said it.
        if not quiet and log_format is LogFormat.text and not (sys.stdout.isatty() and sys.stderr.isatty()):
            typer.echo(result.uri)


@command("plan")
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
    memory: Memory = None,
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
            excludes("--explain", {"--cluster": cluster, "--memory": memory})
        from mergekit_ray.operations.plan import explained, plan
        from mergekit_ray.planning.beforehand.stages import check_fits
        from mergekit_ray.planning.estimate import Cluster, estimate
        from mergekit_ray.planning.figures import figures

        shape = None if cluster is None else Cluster.parse(cluster)
        loaded = load(recipe, voice.warn, lenient=lenient)
        planned = plan(
            loaded,
            seed=seed,
            routing=False,
            options=MergeOptions(
                device="cpu",
                allow_config_conflicts=allow_config_conflicts,
                unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
            ),
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
            more: dict[str, Any] = {} if expected is None else {"estimate": asdict(expected)}
            if memory is not None:
                more["beforehand_bytes"] = sum(each.num_bytes for each in check_fits(planned, memory)[:-1])
            typer.echo(json.dumps({**figures(planned), **more, "plan": planned.to_json()}))
            return
        from mergekit_ray.cli.tables import print_estimate, print_plan

        print_plan(planned, memory)
        if shape is not None and expected is not None:
            print_estimate(shape, expected)


@command()
def validate(
    recipe: RecipeArgument,
    *,
    lenient: Lenient = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also read the models' headers and check that the models fit together.")
    ] = False,
    allow_config_conflicts: AllowConfigConflicts = False,
    unsafe_ignore_tokenizers: UnsafeIgnoreTokenizers = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check RECIPE and report every fault in it."""
    with told_errors(debug, as_json=as_json) as voice:
        if not models:
            flags = {"--unsafe-ignore-tokenizers": unsafe_ignore_tokenizers}
            needs("--models", {"--allow-config-conflicts": allow_config_conflicts, **flags})
        from mergekit_ray.operations.before import parts_of, prepare_parts

        warned: list[str] = []
        warn = (lambda message: warned.append(in_flags(str(message)))) if as_json else voice.warn
        loaded = load(recipe, warn, lenient=lenient)
        parts, kind, found = parts_of(loaded, None), loaded.kind, {}
        if models:
            from mergekit_ray.planning.figures import figures, summary

            *_, prepared = prepare_parts(
                parts,
                allow_config_conflicts=allow_config_conflicts,
                unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
            )
            prepared.check_routable()
            planned = prepared.plan
            for warning in planned.warnings:
                warn(warning)
            said, found = f"valid, and its models fit together: {summary(planned)}", figures(planned)
        else:
            said = "valid"
        if as_json:
            typer.echo(json.dumps({"valid": True, "kind": kind, "warnings": warned, **found}))
        else:
            tell(f"{recipe}: {kind}, {said}", err=False)
