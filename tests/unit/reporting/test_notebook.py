"""Who is shown a bar, and what a notebook shows."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.plan import Plan
from mergekit_ray.reporting.live import LiveReporter
from mergekit_ray.reporting.notebook import Bundle, NotebookReporter, in_notebook
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import LineReporter, SilentReporter
from mergekit_ray.reporting.showing import visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Handle:
    def __init__(self, outputs: list[Bundle], bundle: Bundle) -> None:
        self.outputs = outputs
        self.update(bundle)

    def update(self, bundle: Bundle, *, raw: bool = True) -> None:
        assert raw
        self.outputs.append(bundle)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[list[Bundle]]:
    """A kernel of Jupyter: the states of each output of the cell, in order."""
    outputs: list[list[Bundle]] = []

    def display(bundle: Bundle, *, raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        outputs.append([])
        return Handle(outputs[-1], bundle)

    ipython: Any = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    module: Any = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return outputs


def run(reporter: NotebookReporter, plan: Plan) -> None:
    reporter.begin(plan)
    reporter.event("planned", "a <plan> of [things]")
    reporter.progress(Progress(read_bytes=100, written_bytes=50, num_tensors=2), 0, 3)
    reporter.event("shard_done", "never said")


def test_a_notebook_shows_one_output_that_is_replaced(kernel: list[list[Bundle]], plan: Plan) -> None:
    reporter = NotebookReporter()
    run(reporter, plan)
    [states] = kernel
    before, during = states[0], states[-1]
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    assert before["text/plain"] == "a <plan> of [things]\n"
    assert "a &lt;plan&gt; of [things]" in before["text/html"]
    assert f"2/{num_tensors} tensors" in during["text/plain"]
    assert during["text/plain"].startswith(before["text/plain"])
    assert "never said" not in during["text/plain"]
    assert "<span" in during["text/html"]  # the bar is coloured
    reporter.event("published", "done")
    reporter.close()
    assert kernel == [states]
    assert states[-1]["text/plain"] == "a <plan> of [things]\ndone\n"


def test_an_error_takes_the_bar_away(kernel: list[list[Bundle]], plan: Plan) -> None:
    reporter = NotebookReporter()
    run(reporter, plan)
    reporter.close()
    assert kernel[0][-1] == kernel[0][0]


def test_a_second_plan_has_a_bar_of_its_own(kernel: list[list[Bundle]], plan: Plan) -> None:
    reporter = NotebookReporter()
    run(reporter, plan)
    run(reporter, plan)
    assert kernel[0][-1]["text/plain"].count("tensors") == 1


def test_who_is_shown_a_bar(kernel: list[list[Bundle]], monkeypatch: pytest.MonkeyPatch) -> None:
    own = LineReporter(io.StringIO())
    with visible(own, progress=True) as reporter:
        assert reporter is own
    with visible(None, progress=False) as reporter:
        assert isinstance(reporter, SilentReporter)
    with visible(None, progress=True) as reporter:
        assert isinstance(reporter, NotebookReporter)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", SimpleNamespace)  # IPython on a terminal
    assert not in_notebook()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with visible(None, progress=True) as reporter:
        assert type(reporter) is LiveReporter
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with visible(None, progress=True) as reporter:
        assert isinstance(reporter, SilentReporter)


def test_operations_show_their_bar_unless_they_are_told_not_to(
    kernel: list[list[Bundle]], models: list[Path], tmp_path: Path
) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models[0])}]}
    lora = mergekit_ray.ExtractOptions(rank=1)
    mergekit_ray.merge(recipe, tmp_path / "quiet", progress=False)
    mergekit_ray.reproduce(tmp_path / "quiet", tmp_path / "quiet-too", progress=False)
    mergekit_ray.extract_lora(*models, tmp_path / "quiet-lora", lora, progress=False)
    assert kernel == []
    result = mergekit_ray.merge(recipe, tmp_path / "shown")
    assert kernel[0][-1]["text/plain"].endswith(f"{result.uri} is complete\n")
    again = mergekit_ray.reproduce(tmp_path / "shown", tmp_path / "shown-too")
    assert kernel[1][-1]["text/plain"].endswith(f"{again.uri} is complete\n")
    mergekit_ray.extract_lora(*models, tmp_path / "shown-lora", lora)
    assert len(kernel) == 3
