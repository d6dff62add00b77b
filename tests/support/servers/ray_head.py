"""A head node of Ray, started as an operator starts it: `ray start --head`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from support.merging import COMMANDS, command_environment
from support.servers.ray_cluster import ENVIRONMENT, workers_below
from support.waiting import DEADLINE_SECONDS, wait_until


class RayHead:
    """A head node with its dashboard, on free ports.

    Args:
        num_cpus: that it computes with.
        environment: variables of its processes beside those of all tests, so of the jobs that it runs.
        is_awaited: until it answers; not for one that wants a token, or whose clients are to wait themselves.
        commands: ``bin`` of the virtual environment that it runs in.
    """

    def __init__(
        self,
        num_cpus: int = 2,
        environment: Mapping[str, str] | None = None,
        *,
        is_awaited: bool = True,
        commands: Path = COMMANDS,
    ) -> None:
        self._is_awaited = is_awaited
        self._num_cpus = num_cpus
        self._commands = commands
        outside = [place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != COMMANDS]
        path = os.pathsep.join([str(commands), *outside])
        self.environment = command_environment(**{**ENVIRONMENT, "PATH": path, **(environment or {})})
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def __enter__(self) -> Self:
        port, page, client, agent, agent_grpc, metrics = _free_ports(6)
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{page}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        # Sockets lie in it, and their paths may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        ports = [f"--port={port}", f"--dashboard-port={page}", f"--ray-client-server-port={client}"]
        ports += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        ports += [f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
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
        with log.open("wb") as said:
            process = subprocess.Popen(command, env=self.environment, stdout=said, stderr=said, cwd=self._folder)
        self._process = process

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return bool(self.get(f"{self.dashboard}/api/jobs/"))
            return False

        if not self._is_awaited:
            return self
        try:
            wait_until(answers, every=0.2)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def kill(self) -> None:
        """Kill the node with all that runs on it, as a power cut would."""
        process, self._process = self._process, None
        if process is None:
            return
        # Those whose parent is gone are nobody's children: all are found before the first is killed.
        for each in _below(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.wait()

    def workers(self) -> list[psutil.Process]:
        """The processes that run our actors."""
        return workers_below(self._process.pid) if self._process is not None else []

    @staticmethod
    def get(url: str) -> str:
        """What a page says."""
        with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
            return str(answer.read().decode())

    def _end(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


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
