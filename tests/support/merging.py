"""Running merges from tests: recipes, a reporter that remembers, a merge in the background, the commands."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mergekit_ray
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import MergeResult
from mergekit_ray.reporting.progress import Progress
from support.models import contents
from support.waiting import DEADLINE_SECONDS

COMMANDS = Path(sys.executable).parent
"""Where ``merge`` and ``mergekit-ray`` are installed."""


class Events:
    """A reporter that remembers what it was told.

    Args:
        on_event: called with each kind of event.
    """

    def __init__(self, on_event: Callable[[str], None] = lambda kind: None) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []
        self._on_event = on_event

    def begin(self, plan: Plan) -> None:
        """See `Reporter.begin`."""

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """See `Reporter.event`."""
        self.all.append((kind, {"message": message, **fields}))
        self._on_event(kind)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """See `Reporter.progress`."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The fields of all events of a kind."""
        return [fields for each, fields in self.all if each == kind]


def stop_at(stop: threading.Event, kind: str, times: int = 1) -> Events:
    """A reporter that stops the merge at an event."""

    def note(seen: str) -> None:
        if seen == kind and len(events.of(kind)) >= times:
            stop.set()

    events = Events(note)
    return events


class Background:
    """A merge in a thread.

    Args:
        recipe, out, options: as `mergekit_ray.merge` takes them.
    """

    def __init__(self, recipe: Mapping[str, Any], out: Path, options: MergeOptions) -> None:
        self.events = Events()
        self.stop = threading.Event()
        self._outcome: list[MergeResult | BaseException] = []

        def run() -> None:
            try:
                result = mergekit_ray.merge(recipe, out, options=options, reporter=self.events, stop=self.stop)
            except BaseException as error:  # noqa: BLE001 - raised again by result()
                self._outcome.append(error)
            else:
                self._outcome.append(result)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def result(self, seconds: float = DEADLINE_SECONDS) -> MergeResult:
        """Wait for the end of the merge; raises what it raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the merge did not end within {seconds} s: {self.events.all[-5:]}"
        [outcome] = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def command_environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell: no Ray cluster, nothing said of colours or width."""
    unwanted = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "FORCE_COLOR", "COLUMNS", "TERM")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def run_command(
    name: str, *args: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``merge`` or ``mergekit-ray`` as a user would."""
    return subprocess.run(
        [str(COMMANDS / name), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=dict(env) if env is not None else command_environment(),
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def recipe_of(method: str, base: Path, tuned: Sequence[Path], **more: Any) -> dict[str, Any]:
    """A recipe of one of the methods that tests run everywhere."""
    if method == "linear":
        listed = [{"model": str(m), "parameters": {"weight": 0.5 + i}} for i, m in enumerate([base, *tuned])]
        return {"merge_method": "linear", "models": listed, **more}
    if method == "slerp":
        listed = [{"model": str(base)}, {"model": str(tuned[0])}]
        parameters = {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.3}]}
        return {"merge_method": method, "base_model": str(base), "models": listed, "parameters": parameters, **more}
    listed = [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.5}} for m in tuned]
    return {"merge_method": method, "base_model": str(base), "models": listed, **more}


def undisturbed(recipe: Mapping[str, Any] | Path, out: Path) -> dict[str, bytes]:
    """All files of a merge by two local workers with which nothing interferes.

    The card shows the text of a recipe that is read from a file.
    """
    mergekit_ray.merge(recipe, out, options=MergeOptions(executor="local", num_workers=2))
    return contents(out)
