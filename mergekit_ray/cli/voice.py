"""How a command speaks to its user: in text, on a terminal or to a log, or in JSON lines."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import typer

from mergekit_ray.cli.options import LogFormat, in_flags
from mergekit_ray.core.errors import ConfigError, MergekitRayError
from mergekit_ray.reporting.signals import RESUME
from mergekit_ray.reporting.text import shown

if TYPE_CHECKING:
    from mergekit_ray.reporting.reporters import JsonReporter, Reporter


class Voice:
    """What a command says beside its result.

    Args:
        quiet: say errors only.
        log_format: text on standard error, or JSON lines on standard output.
        as_json: the result is JSON, so what ends the command in its place is a line of JSON, too.
    """

    def __init__(self, *, quiet: bool = False, log_format: LogFormat = LogFormat.text, as_json: bool = False) -> None:
        self._quiet = quiet
        self._json: JsonReporter | None = None
        self._in_place_of_the_result: JsonReporter | None = None
        if log_format is LogFormat.json or as_json:
            from mergekit_ray.reporting.reporters import JsonReporter  # not for text: it imports the plan

            self._in_place_of_the_result = JsonReporter()  # now: its clock starts
            self._json = self._in_place_of_the_result if log_format is LogFormat.json else None

    def say(self, line: str, *, exit_code: int | None = None) -> None:
        """What a signal does: see `reporting.signals.Says`."""
        told = self._json if exit_code is None else self._in_place_of_the_result
        if told is None:
            tell(line)
        elif exit_code is None:
            told.event("stopping", line)
        else:
            told.event("error", line, exit_code=exit_code, remedy=RESUME)

    def warn(self, message: object) -> None:
        """Something that does not end the command."""
        if self._quiet:
            return
        if self._json is None:
            tell(in_flags(f"warning: {message}"))
        else:
            self._json.event("warning", in_flags(str(message)))

    def fail(self, error: MergekitRayError) -> None:
        """What ends the command, with its exit code."""
        told = self._in_place_of_the_result
        if told is None:
            tell(in_flags(f"error: {error}"))
            return
        problems = error.problems if isinstance(error, ConfigError) else ()
        told.event(
            "error",
            in_flags(error.what),
            exit_code=error.exit_code,
            error=type(error).__name__,
            where=error.where,
            remedy=None if error.remedy is None else in_flags(error.remedy),
            problems=[
                {"where": each.where, "path": each.path, "what": each.what, "remedy": each.hint or None}
                for each in problems
            ],
        )

    @contextlib.contextmanager
    def warnings_told(self) -> Iterator[None]:
        """Inside, `warn` shows this package's warnings, without the line of code that raised them."""
        with warnings.catch_warnings():
            show = warnings.showwarning

            def tell_ours(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if category.__module__.startswith("mergekit_ray."):
                    self.warn(message)
                else:
                    show(message, category, *place, **more)

            warnings.showwarning = tell_ours
            yield

    @contextlib.contextmanager
    def reporter(self) -> Iterator[Reporter]:
        """Nothing, JSON lines, a live bar on a terminal, or timed lines."""
        from mergekit_ray.reporting.reporters import LineReporter, SilentReporter

        if self._quiet:
            yield SilentReporter()
        elif self._json is not None:
            yield self._json
        elif sys.stderr.isatty():
            from mergekit_ray.reporting.live import LiveReporter

            with contextlib.closing(LiveReporter()) as live:
                yield live
        else:
            yield LineReporter()


def tell(text: str, *, err: bool = True) -> None:
    """Write a text to standard error, or else to standard output, as `reporting.text.shown` makes it."""
    stream: TextIO = sys.stderr if err else sys.stdout
    typer.echo(shown(text, stream), file=stream)
