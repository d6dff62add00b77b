"""podman, and containers that may do as little as possible."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PODMAN = ROOT / "docker/podman.sh"

CONFINED = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--security-opt=label=disable",
    "--network=none",
)
"""What Kubernetes' restricted security standard gives a container, a read-only file system, and no network."""

WRITABLE_TMP = "--tmpfs=/tmp:rw,mode=1777,size=2g"


def podman(*args: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    """Run podman; what it and the container print is captured."""
    return subprocess.run([str(PODMAN), *map(str, args)], capture_output=True, check=False, timeout=timeout)


def missing() -> str:
    """Why no container can be run here; empty if nothing is in the way."""
    if shutil.which("podman") is None:
        return "podman is not installed"
    answer = podman("info")
    return f"podman does not work: {answer.stderr.decode()}" if answer.returncode else ""


class Image:
    """An image to start containers from.

    Args:
        name: as podman knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[bytes]:
        """Run a command through the image's entry point, confined, until it ends."""
        return podman("run", "--rm", *CONFINED, *options, self.name, *command, timeout=300)

    def ok(self, *command: str, options: Sequence[str] = ()) -> str:
        """What a command prints to standard output; the test fails if the command does."""
        done = self.run(*command, options=options)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        return done.stdout.decode()

    @contextlib.contextmanager
    def start(self, *command: str, options: Sequence[str] = ()) -> Iterator[Container]:
        """A confined container in the background, in place of the entry point; removed at the end."""
        name = f"mergekit-ray-test-{uuid.uuid4().hex}"
        entry = f"--entrypoint={command[0]}"
        started = podman("run", "--detach", f"--name={name}", *CONFINED, *options, entry, self.name, *command[1:])
        assert started.returncode == 0, started.stderr.decode()
        try:
            yield Container(name)
        finally:
            podman("rm", "--force", "--time=5", name)


class Container:
    """A container that runs.

    Args:
        name: as podman knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run another command in it; standard error joins standard output."""
        joined = ["bash", "-c", 'exec "$@" 2>&1', "bash", *command]
        done = podman("exec", self.name, *joined)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), "")

    def log(self) -> str:
        """What it printed so far."""
        done = podman("logs", self.name)
        return done.stdout.decode() + done.stderr.decode()
