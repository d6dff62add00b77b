"""The command line: ``merge`` and ``mergekit-ray``. Nothing imports it.

Only what a command needs is imported when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_ray.core.errors import ConfigError, InternalError, MergekitRayError

if TYPE_CHECKING:
    from mergekit_ray.core.plan import Plan


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


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe (a path).")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown keys in the recipe are warnings, not errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all randomness; overrides the recipe's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Executor = Annotated[
    ExecutorName | None,
    typer.Option("--executor", help="Threads of this process, or Ray (the default inside a Ray job)."),
]
Address = Annotated[str | None, typer.Option("--address", help="Address of the Ray cluster.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Shards in work at a time.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Budget of each worker, e.g. 4GB; else what the plan needs.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another model at OUT.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Names = list[str] | None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge language-model checkpoints across a cluster. Reads mergekit's YAML.",
)


@app.command()
def merge(
    recipe: RecipeArgument,
    output: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix; else the recipe's `output`.")
    ] = None,
    *,
    executor: Executor = None,
    address: Address = None,
    workers: Workers = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Merge NaN and infinities instead of refusing them.")
    ] = False,
    seed: Seed = None,
    lenient: Lenient = False,
    quiet: Quiet = False,
    log_format: Annotated[LogFormat, typer.Option("--log-format", help="Lines of text, or of JSON.")] = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Merge models as RECIPE says and publish the result at OUT.

    Running the same command again after a failure resumes; when the result is there already, nothing is done.
    """
    with _errors(debug), _stop_on_signals() as stop:
        from mergekit_ray.runtime.api import MergeOptions, plan, run_plan, target_of

        loaded = _load(recipe, lenient=lenient, quiet=quiet)
        target = target_of(loaded, output)
        planned = plan(loaded, seed=seed)
        options = MergeOptions(
            executor=None if executor is None else executor.value,
            address=address,
            num_workers=workers,
            memory_bytes=_parse_memory(memory),
            overwrite=overwrite,
            allow_non_finite=allow_non_finite,
        )
        with _reporter(planned, quiet=quiet, log_format=log_format) as reporter:
            for warning in planned.warnings:
                reporter.event("warning", f"warning: {warning}")
            reporter.event("planned", _summary(planned), **_figures(planned))
            result = run_plan(planned, target, options, reporter=reporter, stop=stop)
        if not quiet and log_format is LogFormat.text:
            typer.echo(result.uri)


@app.command("plan")
def plan_command(
    recipe: RecipeArgument,
    *,
    seed: Seed = None,
    lenient: Lenient = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would read, write and need, without reading a weight."""
    with _errors(debug):
        from mergekit_ray.runtime.api import plan

        planned = plan(_load(recipe, lenient=lenient), seed=seed, routing=False)
        if as_json:
            typer.echo(json.dumps({**_figures(planned), "plan": planned.to_json()}))
            return
        from mergekit_ray.runtime.tables import print_plan

        print_plan(planned)


@app.command()
def validate(
    recipe: RecipeArgument,
    *,
    lenient: Lenient = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also open the models' headers and see that they fit together.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check RECIPE and report everything that is wrong with it."""
    with _errors(debug):
        from mergekit_ray.config.moe_recipe import MoeRecipe

        loaded = _load(recipe, lenient=lenient)
        kind = "a Mixture-of-Experts recipe" if isinstance(loaded, MoeRecipe) else "a dense recipe"
        if models:
            from mergekit_ray.runtime.api import plan

            planned = plan(loaded, routing=False)
            for warning in planned.warnings:
                typer.echo(f"warning: {warning}", err=True)
            typer.echo(f"{recipe}: {kind}, valid, and its models fit together: {_summary(planned)}")
        else:
            typer.echo(f"{recipe}: {kind}, valid")


@app.command()
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A published model: folder or s3://bucket/prefix.")],
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read a published model again and compare every byte with its manifest. Exit code 3 if something differs."""
    with _errors(debug):
        from mergekit_ray.core.sizes import format_bytes
        from mergekit_ray.runtime.verify import verify as run
        from mergekit_ray.storage.opening import open_source

        found = run(open_source(out))
        if as_json:
            typer.echo(json.dumps({**vars(found), "ok": not found.problems}))
        elif found.problems:
            for problem in found.problems:
                typer.echo(f"wrong: {problem}", err=True)
        else:
            typer.echo(
                f"{out}: {found.num_shards} shards, {found.num_tensors} tensors, {format_bytes(found.num_bytes)}: "
                "all as written"
            )
        if found.problems:
            raise typer.Exit(3)


@app.command("extract-lora")
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
    executor: Executor = None,
    address: Address = None,
    workers: Workers = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what FINETUNED learnt beyond BASE as a LoRA adapter that PEFT loads.

    Prints how much of each difference the adapter holds, and every difference that it does not.
    """
    with _errors(debug), _stop_on_signals() as stop:
        from functools import partial

        from mergekit_ray.core.dtypes import DType
        from mergekit_ray.planning.extraction import Coverage
        from mergekit_ray.runtime.api import MergeOptions
        from mergekit_ray.runtime.extract_lora import ExtractOptions, extract_lora
        from mergekit_ray.runtime.extraction_report import lines, to_data

        coverage = Coverage(embeddings, tuple(modules_to_save or ()), tuple(exclude or ()))
        options = MergeOptions(
            executor=None if executor is None else executor.value,
            address=address,
            num_workers=workers,
            memory_bytes=_parse_memory(memory),
            overwrite=overwrite,
        )
        wanted = ExtractOptions(rank, energy, coverage, DType.parse(dtype.value))
        reporter_of = partial(_reporter, quiet=quiet or as_json, log_format=LogFormat.text)
        found = extract_lora(finetuned, base, output, wanted, options, reporter_of=reporter_of, stop=stop)
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
    with _errors(debug):
        from mergekit_ray.runtime.tables import describe_methods, methods_markdown, print_method, print_methods

        if markdown:
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
    app()


def merge_main() -> None:
    """Entry point of ``merge``: ``mergekit-ray merge`` for short."""
    _calm_collector()
    short = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    short.command()(merge)
    short()


def _calm_collector() -> None:
    """Keep Python's garbage collector from walking the many lasting objects of torch again and again.

    A process that imports torch and ends took 1.45 s of CPU time with the collector's defaults, 1.09 s this way.
    """
    gc.set_threshold(200_000, 20, 100)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Tell an error in a paragraph and exit with its code."""
    try:
        yield
    except MergekitRayError as error:
        if debug:
            traceback.print_exc()
            if isinstance(error, InternalError):
                typer.echo(error.traceback, err=True)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command to resume", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error: {InternalError.wrap(error)}", err=True)
        raise typer.Exit(InternalError.exit_code) from None


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks for a clean stop, the second ends at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        del frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo(f"{signal.Signals(number).name}: stopping cleanly; once more to stop at once", err=True)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _load(recipe: str, *, lenient: bool, quiet: bool = False) -> Any:
    from mergekit_ray.config import load_recipe

    path = Path(recipe)
    if not path.is_file():
        raise ConfigError(
            "no such file", where=recipe, remedy="give the path of a YAML recipe; see configs/ for examples"
        )

    def warn(message: object) -> None:
        if not quiet:
            typer.echo(f"warning: {message}", err=True)

    return load_recipe(path, lenient=lenient, on_warning=warn)


@contextlib.contextmanager
def _reporter(planned: Plan, *, quiet: bool, log_format: LogFormat) -> Iterator[Any]:
    if quiet:
        from mergekit_ray.runtime.reporting import SilentReporter

        yield SilentReporter()
        return
    from mergekit_ray.runtime.reporting import JsonReporter, LineReporter, LiveReporter

    if log_format is LogFormat.json:
        yield JsonReporter(planned)
    elif sys.stderr.isatty():
        live = LiveReporter(planned)
        try:
            yield live
        finally:
            live.close()
    else:
        yield LineReporter(planned)


def _parse_memory(text: str | None) -> int | None:
    if text is None:
        return None
    from mergekit_ray.config.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from None


def _figures(planned: Plan) -> dict[str, Any]:
    from mergekit_ray.planning.windows import comfortable_memory, memory_needed

    return {
        "num_shards": len(planned.shards),
        "num_tensors": sum(len(shard.tensors) for shard in planned.shards),
        "num_parameters": planned.num_parameters,
        "read_bytes": planned.read_bytes,
        "write_bytes": planned.num_bytes,
        "min_memory_bytes": memory_needed(planned),
        "memory_bytes": comfortable_memory(planned),
        "plan_digest": planned.digest,
    }


def _summary(planned: Plan) -> str:
    from mergekit_ray.core.sizes import format_bytes

    return (
        f"{planned.num_parameters:,} parameters in {len(planned.shards)} shards; "
        f"{format_bytes(planned.read_bytes)} to read, {format_bytes(planned.num_bytes)} to write"
    )
