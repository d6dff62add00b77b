"""What every command shares: reading recipes, reporting errors, showing progress, handling signals."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from mergekit_ray.cli.options import LogFormat
from mergekit_ray.cli.usage import wrong_arguments
from mergekit_ray.cli.voice import Voice
from mergekit_ray.core.errors import ConfigError, InternalError, Interrupted, MergekitRayError, StorageError
from mergekit_ray.core.secrets import RedactedStream
from mergekit_ray.reporting.signals import RESUME, listening
from mergekit_ray.reporting.text import has_colour


class _OurErrors:
    """Of a command: wrong arguments are reported like all errors, and its help is coloured.

    To be mixed into click's classes, which have the methods that are called here. mypy takes `object` for the next
    class, hence the three ignored lines; a command's class as the base would clash with that of a group.
    """

    _voice = Voice()
    _path = ""
    """How the user calls the command."""
    _given: tuple[str, ...] = ()
    """What follows it."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **options: Any) -> Any:
        self._voice = Voice(log_format=_log_format(args), as_json="--json" in args)  # before anything is parsed
        parent = getattr(options.get("parent"), "command_path", "")
        self._path, self._given = f"{parent} {info_name}".strip(), tuple(args)
        with self._told():
            return super().make_context(info_name, args, *more, **options)  # type: ignore[misc] # a mixin of click commands

    def invoke(self, ctx: Any) -> Any:
        with self._told():
            return super().invoke(ctx)  # type: ignore[misc] # a mixin of click commands

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc] # a mixin of click commands
        return [re.sub(r"^\{(\w+)\}$", r"\1", piece) for piece in pieces]  # braces would be a choice

    def get_help(self, ctx: Any) -> str:
        text: str = super().get_help(ctx)  # type: ignore[misc] # a mixin of click commands
        return _HEADING.sub("\x1b[1m\\g<0>\x1b[0m", text) if has_colour(sys.stdout) else text

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:  # options that do not make one of `MergeOptions`
            self._voice.fail(error)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:  # of click's, or of the copy of click that typer may bring
            # Without arguments, the error is the help.
            if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
                raise
            self._voice.fail(wrong_arguments(error, self._path, self._given))
            raise typer.Exit(ConfigError.exit_code) from None


class OurCommand(_OurErrors, TyperCommand):
    """A command. Its help names arguments without their type, which is text for all of them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See `click.Command.format_options`."""
        rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_argument = param.param_type_name == "argument"
                rows[param.param_type_name].append((record[0].split()[0], record[1]) if is_argument else record)
        for title, found in (("Arguments", rows["argument"]), ("Options", rows["option"])):
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)


class OurGroup(_OurErrors, TyperGroup):
    """The command that has the others."""


_HEADING: Final = re.compile(r"^\w+:|^  +--?[\w-]+(, --[\w-]+)?", re.MULTILINE)
"""In a help text: the titles of its parts, and the names of options."""


def _log_format(arguments: Sequence[str]) -> LogFormat:
    """The format that a command line asks for, before it is parsed."""
    asked = "\n".join(arguments).replace("--log-format\n", "--log-format=").splitlines()
    return LogFormat.json if f"--log-format={LogFormat.json.value}" in asked else LogFormat.text


class _Output(RedactedStream):
    """Standard output or error: credentials are hidden, and a failure to write is an error that names the stream.

    Args:
        stream: where it goes; None, for one that the shell has closed, is nowhere.
        name: for messages.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        super().__init__(Path(os.devnull).open("w", encoding="utf-8") if stream is None else stream)  # noqa: SIM115 - to the end
        self._name = name

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        with self._checked():
            return super().write(text)

    def flush(self) -> None:
        """See `io.IOBase.flush`."""
        with self._checked():
            self._stream.flush()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # a reader that has seen enough
            raise
        except OSError as error:
            raise StorageError(
                f"{self._name} cannot be written: {os.strerror(error.errno or errno.EIO)}",
                remedy="write it to another place",
                retryable=False,
            ) from None


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Exit at once with the code raised inside, without the interpreter's clean-up.

    That clean-up takes 0.4 to 1 s with torch. If ray was imported, the process exits in the usual way.

    Until then, credentials are hidden in everything printed, by libraries too.
    """
    sys.stdout, sys.stderr = _Output(sys.stdout, "standard output"), _Output(sys.stderr, "standard error")
    try:
        yield
        code: object = 0
    except SystemExit as leave:
        code = leave.code
    except MergekitRayError as error:  # output that failed where no command tells errors: the help, or an error's text
        code = error.exit_code
        with contextlib.suppress(OSError, MergekitRayError):
            Voice().fail(error)
    if "ray" in sys.modules or not (code is None or isinstance(code, int)):
        sys.exit(code if code is None or isinstance(code, int) else str(code))
    logging.shutdown()
    with contextlib.suppress(OSError, MergekitRayError):  # a reader that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


@contextlib.contextmanager
def told_errors(
    debug: bool,
    *,
    quiet: bool = False,
    log_format: LogFormat = LogFormat.text,
    as_json: bool = False,
    resumes: bool = False,
) -> Iterator[Voice]:
    """Tell an error in a paragraph or as a line of JSON, and exit with its code. Gives the voice for all else.

    Args:
        debug: show its traceback, too.
        quiet: see `Voice`.
        log_format: see `Voice`.
        as_json: see `Voice`.
        resumes: the command keeps finished work, which an interrupted user should know.
    """
    voice = Voice(quiet=quiet, log_format=log_format, as_json=as_json)
    try:
        with voice.warnings_told():
            yield voice
    except MergekitRayError as error:
        if debug:
            traceback.print_exc()
            if isinstance(error, InternalError):
                typer.echo(error.traceback, err=True)
        voice.fail(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        voice.fail(Interrupted("stopped", remedy=RESUME if resumes else None))
        raise typer.Exit(Interrupted.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        voice.fail(InternalError.wrap(error))
        raise typer.Exit(InternalError.exit_code) from None


@contextlib.contextmanager
def stop_on_signals(voice: Voice) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks for a clean stop, the second ends at once."""
    with listening(voice.say) as signals, signals.graceful() as stop:
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
    """Reject options that have no effect together with another one.

    Raises:
        ConfigError: see `needs`.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} has no effect beside {option}", remedy="leave out one of the two")


def load(recipe: str, warn: Callable[[object], None], *, lenient: bool) -> Any:
    """The recipe in a file, in a store, on standard input (``-``), or in a text of several lines.

    ``warn`` gets what has no effect.

    Raises:
        ConfigError: there is no such file, or the recipe is wrong.
        StorageError: the store that should have it failed.
    """
    from mergekit_ray.operations.recipes import is_uri, load_recipe

    return load_recipe(
        recipe if is_uri(recipe) or "\n" in recipe else Path("/dev/stdin" if recipe == "-" else recipe),
        lenient=lenient,
        on_warning=warn,
    )
