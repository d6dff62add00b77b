"""A worker behind a link that hardly carries anything any more is given up, and the merge ends right."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from mergekit_ray.executors.watch import SECONDS_VARIABLE
from support.merging import COMMANDS, command_environment, recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.servers import hosts as hosts_module
from support.servers.hosts import Hosts
from support.servers.ray_head import RayHead, RayNode
from support.waiting import DEADLINE_SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_worker_behind_a_link_of_1_kbit_per_second(models: ModelLibrary, tmp_path: Path) -> None:
    """It alone can work until its link is cut to that; then another node joins. The disk is everybody's."""
    obstacle = hosts_module.missing()
    if obstacle or "MERGEKIT_RAY_SLOW_LINK" not in os.environ:
        pytest.skip(obstacle or "two minutes on an idle machine: `make soak` runs it")
    base, *tuned = (models.get("llama", variant, num_layers=24) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"max_shard_size": 1})
    path, out = tmp_path / "many.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    with Hosts("mkrslow", 2, network="10.89.0") as hosts, RayHead(0, host=hosts.hub) as head:
        (slow, other), (slow_address, other_address) = hosts.names, hosts.addresses
        command = [str(COMMANDS / "merge"), str(path), str(out), "--executor", "ray", "--address", head.address]
        environment = command_environment(**head.environment, **{SECONDS_VARIABLE: "10"})
        with (
            RayNode(head, slow, slow_address),
            subprocess.Popen(
                [*command, "--log-format", "json"], stdout=-1, stderr=-1, text=True, env=environment
            ) as process,
        ):
            assert process.stdout is not None
            told = []
            for line in process.stdout:
                told.append(json.loads(line))
                if told[-1]["event"] == "shard_done":
                    break
            hosts.throttle(slow, 1)
            with RayNode(head, other, other_address):
                said, wrong = process.communicate(timeout=DEADLINE_SECONDS)
    told += map(json.loads, said.splitlines())
    assert process.returncode == 0, wrong
    given_up = [each["worker"] for each in told if each["event"] == "worker_given_up"]
    assert len(given_up) == 1
    assert given_up[0].startswith("worker-0 ")
    assert contents(out) == undisturbed(path, tmp_path / "expected")
