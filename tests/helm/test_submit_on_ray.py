"""The submitter's script against a real Ray that asks for a token."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from helm.charts import CHART
from support.merging import COMMANDS, command_environment, run_command

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
time.sleep(100)
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of the submitter, for a cluster of one node with a token."""
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, and their paths may have 107 characters
    ports = free_ports(6)
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
             "dashboard-agent-grpc-port", "metrics-export-port")  # fmt: skip
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=1", f"--temp-dir={folder}"]
    path = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "PATH": path}
    of_cluster = command_environment(**settings)
    command = [str(COMMANDS / "ray"), "start", "--head", "--block", f"--object-store-memory={80 << 20}", *options]
    with Path(folder, "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=of_cluster, stdout=log, stderr=log, cwd=folder)
    try:
        yield {**of_cluster, "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Runs:
    """Three submitters at once, begun before the cluster is up, as pods may be."""

    merge: subprocess.Popen[str]
    wrong: subprocess.Popen[str]
    stopped: subprocess.Popen[str]
    folder: Path


@pytest.fixture(scope="module")
def runs(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
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
    yield started
    for process in (started.merge, started.wrong, started.stopped):
        process.kill()
        process.wait()


def test_a_merge_on_a_cluster_with_a_token(runs: Runs) -> None:
    said, _ = runs.merge.communicate(timeout=200)
    assert runs.merge.returncode == 0, said
    assert f"{runs.folder / 'out'} is complete" in said
    assert run_command("mergekit-ray", "verify", runs.folder / "out").returncode == 0


def test_a_wrong_recipe_is_not_worth_a_retry(runs: Runs) -> None:
    said, _ = runs.wrong.communicate(timeout=200)
    assert runs.wrong.returncode == 2, said
    assert "recipe.yml:1" in said


def test_sigterm_lets_the_merge_stop_cleanly(runs: Runs) -> None:
    assert runs.stopped.stdout is not None
    for line in runs.stopped.stdout:
        if "at work" in line:
            break
    runs.stopped.send_signal(signal.SIGTERM)
    said, _ = runs.stopped.communicate(timeout=100)
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


def end(process: subprocess.Popen[bytes]) -> None:
    """End what was started, by its own process ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(started, timeout=10)
    process.kill()
    process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
