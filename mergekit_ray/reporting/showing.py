"""Which reporter a call from Python gets."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergekit_ray.reporting.reporters import Reporter, SilentReporter

if TYPE_CHECKING:
    from mergekit_ray.reporting.live import LiveReporter


@contextlib.contextmanager
def visible(reporter: Reporter | None, *, progress: bool) -> Iterator[Reporter]:
    """The reporter to tell.

    Args:
        reporter: the caller's own, if there is one.
        progress: without one, show a live bar where somebody can see it: in a notebook, or on a terminal.

    Raises:
        KeyboardInterrupt: as raised inside, with a note on how to resume, which Python shows with it.
    """
    live = _live() if reporter is None and progress else None
    try:
        with contextlib.nullcontext() if live is None else contextlib.closing(live):
            yield reporter or live or SilentReporter()
    except KeyboardInterrupt as error:
        error.add_note("stopped; finished shards are kept: run the same call again to resume")
        raise


def _live() -> LiveReporter | None:
    """A bar for a notebook or a terminal; None where the error output is neither."""
    # rich costs a tenth of a second to import, which only those pay who see it.
    if "IPython" in sys.modules:
        from mergekit_ray.reporting.notebook import NotebookReporter, in_notebook  # noqa: PLC0415

        if in_notebook():
            return NotebookReporter()
    if sys.stderr.isatty():
        from mergekit_ray.reporting.live import LiveReporter  # noqa: PLC0415

        return LiveReporter()
    return None
