"""A head node of Ray, started as an operator starts it: `ray start --head`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Self

import psutil

from support.merging import COMMANDS, command_environment
from support.servers.ray_cluster import ENVIRONMENT, MAX_ATTEMPTS, workers_below
from support.waiting import DEADLINE_SECONDS, wait_until


class RayHead:
    """A head node with its dashboard, on free ports.

    Args:
        num_cpus: that it computes with.
        environment: variables of its processes beside those of all tests, so of the jobs that it runs.
        commands: ``bin`` of the virtual environment that it runs in.
        host: address that it is reached at.

    Attributes:
        address: of the cluster; known, as the others, before it is up.
        dashboard: address of its page, where jobs are submitted.
        metrics: address of what Prometheus reads.
        environment: of its processes, and for its clients.
    """

    def __init__(
        self,
        num_cpus: int = 2,
        environment: Mapping[str, str] | None = None,
        *,
        commands: Path = COMMANDS,
        host: str = "127.0.0.1",
    ) -> None:
        self._host = host
        self._num_cpus = num_cpus
        self._commands = commands
        outside = [place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != COMMANDS]
        path = os.pathsep.join([str(commands), *outside])
        self.environment = command_environment(**{**ENVIRONMENT, "PATH": path, **(environment or {})})
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._ports = _free_ports(6)
        port, page, *_, metrics = self._ports
        self.address = f"{host}:{port}"
        self.dashboard = f"http://{host}:{page}"
        self.metrics = f"http://{host}:{metrics}/metrics"

    def __enter__(self) -> Self:
        port, page, client, agent, agent_grpc, metrics = self._ports
        # It holds sockets, whose paths may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        ports = [f"--port={port}", f"--dashboard-port={page}", f"--ray-client-server-port={client}"]
        ports += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        ports += [f"--metrics-export-port={metrics}", f"--node-ip-address={self._host}"]
        ports += [f"--dashboard-host={self._host}"]
        sizes = [f"--num-cpus={self._num_cpus}", f"--object-store-memory={80 << 20}", f"--temp-dir={self._folder}"]
        command = [
            str(self._commands / "ray"),
            "start",
            "--head",
            "--block",
            "--include-dashboard=true",
            *ports,
            *sizes,
        ]
        log = Path(self._folder) / "start.log"
        try:
            for _ in range(MAX_ATTEMPTS):
                with log.open("wb") as said:
                    process = subprocess.Popen(
                        command, env=self.environment, stdout=said, stderr=said, cwd=self._folder
                    )
                self._process = process
                wait_until(lambda process=process: process.poll() is not None or self._answers(), every=0.2)
                if process.poll() is None:
                    return self
                self.kill()
            raise AssertionError(log.read_text())
        except BaseException:
            self._end()
            raise

    def _answers(self) -> bool:
        try:
            self.get(f"{self.dashboard}/api/jobs/")
        except urllib.error.HTTPError as refusal:
            return refusal.code == HTTPStatus.UNAUTHORIZED  # it wants a token
        except OSError:
            return False
        return True

    def __exit__(self, *exc: object) -> None:
        self._end()

    def kill(self) -> None:
        """Kill the node with all that runs on it, as a power cut would."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill_tree(process)

    def kill_raylet(self) -> None:
        """Kill the process that does Ray's work on this machine, as the kernel does where memory runs out."""
        assert self._process is not None
        [raylet] = [each for each in _below(self._process.pid) if each.name() == "raylet"]
        raylet.kill()

    def workers(self, kind: str = "RayWorker") -> list[psutil.Process]:
        """The processes that run our actors, or a task of another name."""
        return workers_below(self._process.pid, kind) if self._process is not None else []

    @staticmethod
    def get(url: str) -> str:
        """What a page says."""
        with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
            return str(answer.read().decode())

    def _end(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class RayNode:
    """A node with one CPU on a host of its own, which joins a cluster: `ray start --address`.

    Args:
        head: of the cluster.
        netns: network namespace that it runs in.
        address: of the host.
    """

    def __init__(self, head: RayHead, netns: str, address: str) -> None:
        arguments = [f"--address={head.address}", f"--node-ip-address={address}", "--num-cpus=1", "--block"]
        start = [str(COMMANDS / "ray"), "start", *arguments, f"--object-store-memory={80 << 20}"]
        self._command = ["ip", "netns", "exec", netns, *start]
        self._environment = head.environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, env=self._environment, stdout=quiet, stderr=quiet)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            _kill_tree(self._process)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    # Those whose parent is gone are nobody's children: all are found before the first is killed.
    for each in _below(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
