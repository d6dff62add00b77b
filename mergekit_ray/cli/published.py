"""Commands on published models: `verify`, `attest`, `reproduce`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mergekit_ray.cli.app import command
from mergekit_ray.cli.options import (
    AsJson,
    Debug,
    PublishedModel,
    Quiet,
    takes_merge_options,
)
from mergekit_ray.cli.running import (
    needs,
    stop_on_signals,
    told_errors,
)
from mergekit_ray.cli.usage import whole
from mergekit_ray.cli.voice import tell
from mergekit_ray.operations.options import MergeOptions


@command()
def verify(
    out: PublishedModel,
    *,
    sample: Annotated[
        int | None,
        typer.Option("--sample", parser=whole(0), metavar="N", help="Read only N tensors, drawn at random; 0: none."),
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
                unread = " (but no tensor was read)" if sample == 0 else ""
                tell(f"{out}: {', '.join(counts)}: all as written{unread}", err=False)
        if found.problems:
            raise typer.Exit(3)


@command()
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


@command("reproduce")
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
