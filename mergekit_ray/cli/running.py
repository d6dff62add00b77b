"""What surrounds a command: its recipe read, its errors told, its progress shown, its signals heard."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mergekit_ray.cli.options import LogFormat
from mergekit_ray.core.errors import ConfigError, InternalError, MergekitRayError
from mergekit_ray.core.secrets import RedactedStream, redact
from mergekit_ray.reporting.signals import listening

if TYPE_CHECKING:
    from mergekit_ray.reporting.reporters import Reporter


class _DiscreetErrors:
    """Of a command: credentials are hidden in what is said of wrong arguments, before it is wrapped to the terminal.

    To be mixed into click's classes, which have the methods that are called here.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _discreet():
            return super().make_context(*args, **options)  # type: ignore[misc]  # of click's class

    def invoke(self, ctx: Any) -> Any:
        with _discreet():
            return super().invoke(ctx)  # type: ignore[misc]  # of click's class


class DiscreetCommand(_DiscreetErrors, TyperCommand):
    """A command that stands alone."""


class DiscreetGroup(_DiscreetErrors, TyperGroup):
    """The command that has the others."""


@contextlib.contextmanager
def _discreet() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of click's, or of the copy of click that typer may bring
        if isinstance(message := getattr(error, "message", None), str):
            error.message = redact(message)  # type: ignore[attr-defined]  # it has one, see above
        raise


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End the process with the exit code that comes by, without taking apart what ends with it anyway.

    Credentials are hidden in all that is printed until then, by libraries too.

    torch takes 0.4 to 1 s for that. Where ray is there it is left to end in its own way.
    """
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    try:
        yield
        code: object = 0
    except SystemExit as leave:
        code = leave.code
    if "ray" in sys.modules or not (code is None or isinstance(code, int)):
        sys.exit(code if code is None or isinstance(code, int) else str(code))
    logging.shutdown()
    with contextlib.suppress(OSError):  # a reader that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


@contextlib.contextmanager
def told_errors(debug: bool) -> Iterator[None]:
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
def stop_on_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks for a clean stop, the second ends at once."""
    with listening(say) as signals, signals.graceful() as stop:
        yield stop


def needs(option: str, given: Mapping[str, object]) -> None:
    """Refuse options that have no effect without another, which is not given.

    Raises:
        ConfigError: naming one of ``given`` whose value is other than None and False.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} has no effect without {option}", remedy=f"add {option}, or leave out {name}")


def excludes(option: str, given: Mapping[str, object]) -> None:
    """Refuse options that have no effect beside another, which is given.

    Raises:
        ConfigError: see `needs`.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} has no effect beside {option}", remedy="leave out one of the two")


def say(line: str) -> None:
    """Write a line to stderr."""
    typer.echo(line, err=True)


def load(recipe: str, *, lenient: bool, quiet: bool = False) -> Any:
    """The recipe in a file, or in a store; what ``lenient`` lets pass is told unless ``quiet``.

    Raises:
        ConfigError: there is no such file, or the recipe is wrong.
        StorageError: the store that should have it failed.
    """
    from mergekit_ray.operations.recipes import is_uri, load_recipe

    def warn(message: object) -> None:
        if not quiet:
            typer.echo(f"warning: {message}", err=True)

    return load_recipe(recipe if is_uri(recipe) else Path(recipe), lenient=lenient, on_warning=warn)


@contextlib.contextmanager
def reporter(*, quiet: bool, log_format: LogFormat = LogFormat.text) -> Iterator[Reporter]:
    """Nothing, JSON lines, a live bar on a terminal, or timed lines."""
    from mergekit_ray.reporting.reporters import JsonReporter, LineReporter, SilentReporter

    if quiet:
        yield SilentReporter()
    elif log_format is LogFormat.json:
        yield JsonReporter()
    elif sys.stderr.isatty():
        from mergekit_ray.cli.live import LiveReporter

        live = LiveReporter()
        try:
            yield live
        finally:
            live.close()
    else:
        yield LineReporter()
