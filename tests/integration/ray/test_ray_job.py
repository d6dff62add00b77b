"""`ray job submit ... -- merge configs/x.yml` against a Ray started as an operator starts it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from support.merging import COMMANDS, recipe_of, run_command, undisturbed
from support.models import ModelLibrary, contents, load
from support.servers.ray_cluster import freeze
from support.servers.ray_head import RayHead
from support.waiting import DEADLINE_SECONDS, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Of two CPUs. It gives jobs that are stopped all the time they need, where Ray's default is three seconds."""
    with RayHead(environment={"RAY_JOB_STOP_WAIT_TIME_S": f"{DEADLINE_SECONDS:.0f}"}) as head:
        yield head


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """What is handed in with the job: a folder with ``configs/``."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    return folder


def submit(head: RayHead, working_dir: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end."""
    ray = [str(COMMANDS / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", str(working_dir), "--"]
    return subprocess.run(
        [*ray, *command], capture_output=True, text=True, env=head.environment, timeout=DEADLINE_SECONDS, check=False
    )


def test_submitted_merge_publishes_a_model(
    head: RayHead, working_dir: Path, models: ModelLibrary, tmp_path: Path
) -> None:
    base, *tuned = (models.get("llama", variant, with_tokenizer=True) for variant in range(3))
    out = tmp_path / "out"
    recipe = recipe_of("ties", base, tuned, output={"path": str(out), "max_shard_size": 60_000})
    (working_dir / "configs" / "ties.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = submit(head, working_dir, "merge", "configs/ties.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out} is complete" in done.stdout
    # It ran on the cluster that the job is in, not in the job's own process.
    assert '"RayWorker"' in head.get(f"{head.dashboard}/api/v0/actors")
    assert run_command("mergekit-ray", "verify", out).returncode == 0
    load(out)
    assert contents(out) == undisturbed(working_dir / "configs" / "ties.yml", tmp_path / "local")


def test_wrong_recipe_reaches_the_submitter(head: RayHead, working_dir: Path, tmp_path: Path) -> None:
    (working_dir / "configs" / "wrong.yml").write_text("merge_method: liner\nmodels:\n  - model: a\n")
    done = submit(head, working_dir, "merge", "configs/wrong.yml", str(tmp_path / "out"))
    assert done.returncode != 0
    assert "configs/wrong.yml:1" in done.stdout
    assert "linear" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def many(working_dir: Path, models: ModelLibrary) -> Path:
    """``configs/many.yml`` of over a hundred shards: long enough to be interrupted."""
    base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"max_shard_size": 1})
    file = working_dir / "configs" / "many.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


class Submitted:
    """``ray job submit`` of ``configs/many.yml`` in a process of its own, once shards have been written.

    Its workers are frozen, so that it cannot end, until `go_on`.
    """

    def __init__(self, head: RayHead, working_dir: Path, number: str, out: Path) -> None:
        self._head = head
        self.number = number
        command = [str(COMMANDS / "ray"), "job", "submit", "--address", head.dashboard, "--submission-id", number]
        command += ["--working-dir", str(working_dir), "--", "merge", "configs/many.yml", str(out)]
        self.process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=head.environment)
        wait_until(lambda: len(list(out.glob("*.safetensors"))) > 3, every=0.001)
        self._frozen = head.workers()
        for worker in self._frozen:
            freeze(worker)
        assert self._frozen
        assert not (out / "model.safetensors.index.json").exists()

    def go_on(self) -> None:
        """Thaw the workers. Ray may have ended one that had nothing to do."""
        for worker in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()

    @property
    def status(self) -> str:
        """What Ray says of the job."""
        return str(self.told["status"])

    @property
    def told(self) -> dict[str, Any]:
        """All that Ray says of it."""
        found: dict[str, Any] = json.loads(self._head.get(f"{self._head.dashboard}/api/jobs/{self.number}"))
        return found

    def stop(self) -> None:
        """What ``ray job stop`` asks for, without the seconds that the command takes to start."""
        url = f"{self._head.dashboard}/api/jobs/{self.number}/stop"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=DEADLINE_SECONDS) as answer:
            assert json.loads(answer.read()) == {"stopped": True}


def test_interrupting_the_submitter_does_not_stop_the_job(
    head: RayHead, working_dir: Path, many: Path, tmp_path: Path
) -> None:
    job = Submitted(head, working_dir, "interrupted", tmp_path / "out")
    assert job.status == "RUNNING"
    job.process.send_signal(signal.SIGINT)
    job.process.communicate(timeout=DEADLINE_SECONDS)
    job.go_on()
    wait_until(lambda: job.status != "RUNNING", every=0.5)
    assert job.status == "SUCCEEDED", json.dumps(job.told)
    assert contents(tmp_path / "out") == undisturbed(many, tmp_path / "expected")


def test_a_job_that_is_stopped_leaves_nothing_half_written_and_is_resumed(
    head: RayHead, working_dir: Path, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = Submitted(head, working_dir, "stopped", out)
    job.stop()
    job.go_on()
    said, _ = job.process.communicate(timeout=DEADLINE_SECONDS)
    assert job.status == "STOPPED"
    assert "run the same command" in said
    assert not (out / "model.safetensors.index.json").exists()
    assert list(out.rglob("*.tmp")) == []
    again = submit(head, working_dir, "merge", "configs/many.yml", str(out))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "shards already there" in again.stdout
    assert contents(out) == undisturbed(many, tmp_path / "expected")
