"""The whole Ray cluster dies under a merge; on a new one the same command makes the same model."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from support.merging import COMMANDS, command_environment, recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.moe_cases import MIXTRAL, expert
from support.servers.ray_cluster import freeze
from support.servers.ray_head import RayHead
from support.waiting import DEADLINE_SECONDS, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


IMPATIENT = {"MERGEKIT_RAY_HEAD_SECONDS": "5", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""The merge notices first that the head is gone, however busy the machine is; Ray's answer is to end the process."""


@contextmanager
def merging(head: RayHead, recipe: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    command = [str(COMMANDS / "merge"), str(recipe), str(out), "--executor", "ray", "--address", head.address]
    command += ["--log-format", "json"]
    environment = command_environment(**head.environment, **IMPATIENT)
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], kind: str, times: int) -> None:
    """Read what the merge says until an event has come so many times."""
    assert process.stdout is not None
    for line in process.stdout:
        times -= json.loads(line)["event"] == kind
        if times == 0:
            return
    raise AssertionError(f"the merge ended before {kind!r}: {process.stderr and process.stderr.read()}")


@pytest.mark.parametrize("num_done", [1, 40])
def test_the_head_is_killed_with_all_its_workers(num_done: int, models: ModelLibrary, tmp_path: Path) -> None:
    """While shards are written."""
    base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"max_shard_size": 1})
    path, out = tmp_path / "many.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    with RayHead() as head, merging(head, path, out) as process:
        wait_for(process, "shard_done", num_done)
        head.kill()
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 4, said
        assert "run the same command" in said
        assert not (out / "model.safetensors.index.json").exists()
    with RayHead() as head, merging(head, path, out) as process:
        said, wrong = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, wrong
    assert any(json.loads(line)["event"] == "resumed" for line in said.splitlines())
    assert contents(out) == undisturbed(path, tmp_path / "expected")


def test_ray_is_killed_on_the_drivers_machine(models: ModelLibrary, tmp_path: Path) -> None:
    """Its head still answers, and its workers work on until they notice."""
    base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
    path, out = tmp_path / "many.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe_of("ties", base, tuned, output={"max_shard_size": 1})))
    with RayHead() as head, merging(head, path, out) as process:
        wait_for(process, "shard_done", 1)
        head.kill_raylet()
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 4, said
    assert "Ray has ended on this machine" in said
    assert "run the same command" in said
    assert not (out / "model.safetensors.index.json").exists()


def test_ray_is_killed_while_routers_are_made(models: ModelLibrary, tmp_path: Path) -> None:
    base, other = models.get("llama", 1, with_tokenizer=True), models.get("llama", 2)
    listed = [expert(base, positive_prompts=["the capital"]), expert(other, positive_prompts=["of France"])]
    path, out = tmp_path / "mixture.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(MIXTRAL.recipe(base, *listed, gate_mode="hidden")))
    with RayHead() as head, merging(head, path, out) as process:
        wait_until(lambda: process.poll() is not None or head.workers("_compute"), every=0.05)
        for worker in head.workers("_compute"):
            freeze(worker)  # it does not end before Ray does
        head.kill_raylet()
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 4, said
    assert "Ray has ended on this machine" in said
    assert "run the same command" in said
    assert not out.exists()


@pytest.mark.parametrize("event", ["planned", "checking", "publishing"])
def test_the_head_is_killed_before_the_first_shard_and_after_the_last(
    event: str, models: ModelLibrary, tmp_path: Path
) -> None:
    """Then there is no cluster to begin with, or none is needed any more."""
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"max_shard_size": 45_000})
    path, out = tmp_path / "few.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    with RayHead() as head, merging(head, path, out) as process:
        wait_for(process, event, 1)
        head.kill()
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == (4 if event == "planned" else 0), said
        if event == "planned":
            assert "cannot connect to Ray" in said
            assert not (out / "model.safetensors.index.json").exists()
    if event == "planned":
        with RayHead() as head, merging(head, path, out) as process:
            said, _ = process.communicate(timeout=DEADLINE_SECONDS)
            assert process.returncode == 0, said
    assert contents(out) == undisturbed(path, tmp_path / "expected")
