"""The live bar in a notebook, drawn as HTML."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any, Final

from rich.console import Console, RenderableType

from mergekit_ray.core.plan import Plan
from mergekit_ray.reporting.live import LiveReporter
from mergekit_ray.reporting.progress import Progress

Bundle = dict[str, str]
"""One output of a cell: its text by MIME type."""

_WIDTH: Final = 100
_HTML: Final = '<pre style="margin:0;white-space:pre;line-height:normal;font-family:monospace">{code}</pre>'
_AFTER_THE_BAR: Final = ("checking", "publishing", "published", "already_done")


def in_notebook() -> bool:
    """Whether this code runs in a kernel of Jupyter, which shows HTML, rather than in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookReporter(LiveReporter):
    """`LiveReporter` in a notebook: one output of the cell, which is replaced while the merge goes on.

    It is plain HTML, so it needs no widget extension, and a saved notebook keeps what it showed last.

    Args:
        show: shows the output the first time it is called, and replaces it from then on; IPython's display if None.
    """

    def __init__(self, show: Callable[[Bundle], None] | None = None) -> None:
        super().__init__(_page())
        self._bar.disable = True  # rich would need ipywidgets to move it
        self._show = show or _ipython_output()
        self._is_running = False

    def begin(self, plan: Plan) -> None:
        """A new bar, which appears with the first progress."""
        super().begin(plan)
        self._is_running = False

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """A line above the bar; finished shards move the bar only."""
        super().event(kind, message, **fields)
        if kind in _AFTER_THE_BAR:
            self._is_running = False
        self._draw()

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """Move the bar."""
        super().progress(progress, num_done, num_shards)
        self._is_running = True
        self._draw()

    def close(self) -> None:
        """Take the bar away; the lines stay."""
        super().close()
        if self._is_running:
            self._is_running = False
            self._draw()

    def _draw(self) -> None:
        pages = [self._console, *([_page(self._bar.get_renderable())] if self._is_running else [])]
        html = "".join(page.export_html(clear=False, inline_styles=True, code_format=_HTML) for page in pages)
        text = "".join(page.export_text(clear=False) for page in pages)
        self._show({"text/html": html, "text/plain": text})


def _page(*content: RenderableType) -> Console:
    """A console whose content becomes HTML."""
    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False)
    console.print(*content, end="")
    return console


def _ipython_output() -> Callable[[Bundle], None]:
    from IPython.display import display  # noqa: PLC0415 - only a notebook has it

    handle: Any = None

    def show(bundle: Bundle) -> None:
        nonlocal handle
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    return show
