"""The submitter's script against a real Ray that asks for a token."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helm.charts import CHART
from support.merging import run_command
from support.servers.ray_head import RayHead
from support.waiting import DEADLINE_SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = "0123456789abcdef0123456789abcdef"
CLEAN_STOP = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(4)  # longer than Ray waits by default
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("at work", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Runs:
    """Three submitters at once, begun before the cluster is up, as pods may be."""

    merge: subprocess.Popen[str]
    wrong: subprocess.Popen[str]
    stopped: subprocess.Popen[str]
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """For a cluster of one node with a token."""
    head = RayHead(1, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN})
    environment = {**head.environment, "RAY_DASHBOARD_ADDRESS": head.dashboard}
    folder = tmp_path_factory.mktemp("runs")
    make_models(folder)
    models = "".join(f"  - model: {folder / name}\n    parameters: {{weight: 0.5}}\n" for name in ("first", "second"))

    def start(run: str, recipe: str, *command: str) -> subprocess.Popen[str]:
        file = folder / f"{run}.yml"
        file.write_text(recipe)
        script = [sys.executable, str(CHART / "files" / "submit.py"), str(file), "--"]
        named = {**environment, "MERGE_RUN": run}
        return subprocess.Popen([*script, *command], env=named, stdout=subprocess.PIPE, text=True)

    merge = ("merge", "recipe.yml", str(folder / "out"), "--executor", "ray")
    started = Runs(
        start("merge", f"merge_method: linear\nmodels:\n{models}dtype: float32\n", *merge),
        start("wrong", "merge_method: liner\nmodels:\n  - model: a\n", *merge),
        start("stopped", "", sys.executable, "-c", CLEAN_STOP, str(folder / "stopped")),
        folder,
    )
    try:
        with head:
            yield started
    finally:
        for process in (started.merge, started.wrong, started.stopped):
            process.kill()
            process.wait()


def test_a_merge_on_a_cluster_with_a_token(runs: Runs) -> None:
    said, _ = runs.merge.communicate(timeout=DEADLINE_SECONDS)
    assert runs.merge.returncode == 0, said
    assert f"{runs.folder / 'out'} is complete" in said
    assert run_command("mergekit-ray", "verify", runs.folder / "out").returncode == 0


def test_a_wrong_recipe_is_not_worth_a_retry(runs: Runs) -> None:
    said, _ = runs.wrong.communicate(timeout=DEADLINE_SECONDS)
    assert runs.wrong.returncode == 2, said
    assert "recipe.yml:1" in said


def test_sigterm_lets_the_merge_stop_cleanly(runs: Runs) -> None:
    assert runs.stopped.stdout is not None
    for line in runs.stopped.stdout:
        if "at work" in line:
            break
    runs.stopped.send_signal(signal.SIGTERM)
    said, _ = runs.stopped.communicate(timeout=DEADLINE_SECONDS)
    assert runs.stopped.returncode == 143, said
    assert (runs.folder / "stopped").exists(), said


def make_models(folder: Path) -> None:
    """The two models of the chart's own test."""
    spec = importlib.util.spec_from_file_location("tiny_merge", CHART / "files" / "tiny_merge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for seed, name in enumerate(("first", "second")):
        module.make_model(folder / name, seed)
