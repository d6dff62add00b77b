"""`ray job submit ... -- merge configs/x.yml` against a Ray started as an operator starts it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

import mergekit_ray
from mergekit_ray.runtime.api import MergeOptions
from support.merging import COMMANDS, command_environment, recipe_of, run_command, wait_until
from support.models import ModelLibrary, contents, load
from support.ray_cluster import ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """For Ray and its jobs; the commands of this virtual environment come first."""
    return command_environment(**ENVIRONMENT, PATH=f"{COMMANDS}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """A head node of two CPUs; gives the address that jobs are submitted to."""
    port, page, client, agent, agent_grpc, metrics = _free_ports(6)
    # Sockets lie in it, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    ports = [f"--port={port}", f"--dashboard-port={page}", f"--ray-client-server-port={client}"]
    ports += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    ports += [f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    sizes = ["--num-cpus=2", f"--object-store-memory={80 << 20}", f"--temp-dir={folder}"]
    command = [str(COMMANDS / "ray"), "start", "--head", "--block", "--include-dashboard=true", *ports, *sizes]
    log = Path(folder) / "start.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd=folder)
    try:
        address = f"http://127.0.0.1:{page}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            return _answers(f"{address}/api/jobs/")

        wait_until(answers, seconds=90, every=0.5)
        yield address
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """What is handed in with the job: a folder with ``configs/``."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    return folder


def submit(
    dashboard: str, working_dir: Path, environment: dict[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end."""
    ray = [str(COMMANDS / "ray"), "job", "submit", "--address", dashboard, "--working-dir", str(working_dir), "--"]
    return subprocess.run([*ray, *command], capture_output=True, text=True, env=environment, timeout=150, check=False)


def test_submitted_merge_publishes_a_model(
    dashboard: str, working_dir: Path, environment: dict[str, str], models: ModelLibrary, tmp_path: Path
) -> None:
    base, *tuned = (models.get("llama", variant, with_tokenizer=True) for variant in range(3))
    out = tmp_path / "out"
    recipe = recipe_of("ties", base, tuned, output={"path": str(out), "max_shard_size": 60_000})
    (working_dir / "configs" / "ties.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = submit(dashboard, working_dir, environment, "merge", "configs/ties.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out} is complete" in done.stdout
    # It ran on the cluster that the job is in, not in the job's own process.
    assert '"RayWorker"' in _get(f"{dashboard}/api/v0/actors")
    assert run_command("mergekit-ray", "verify", out).returncode == 0
    load(out)
    mergekit_ray.merge(recipe, tmp_path / "local", options=MergeOptions(executor="local"))
    assert contents(out) == contents(tmp_path / "local")


def test_wrong_recipe_reaches_the_submitter(
    dashboard: str, working_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    (working_dir / "configs" / "wrong.yml").write_text("merge_method: liner\nmodels:\n  - model: a\n")
    done = submit(dashboard, working_dir, environment, "merge", "configs/wrong.yml", str(tmp_path / "out"))
    assert done.returncode != 0
    assert "configs/wrong.yml:1" in done.stdout
    assert "linear" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(_get(url))
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
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


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
