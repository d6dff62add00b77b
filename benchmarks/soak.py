"""Many merges from S3 to S3, each through a proxy that fails by a schedule drawn from a seed.

    PYTHONPATH=tests python -m benchmarks.soak [--schedules 1000] [--duels 0] [--first 0]

Between the client and a real S3 server (SeaweedFS) requests are answered with 500, 503 and 429, connections reset,
answers lost, bodies cut short, slowed or changed by a bit, credentials expire, single requests are denied. What passes
must be absorbed; what lasts must end in an error that says what to do, with nothing published; run again without the
proxy, every output must be the bytes of an undisturbed merge, and no unfinished upload may stay behind. The first
schedule that breaks this is named and ends the run with exit code 1.

With ``--duels``, two drivers with unlike recipes, workers, memory and ``ATEN_CPU_CAPABILITY`` want one output as well,
by turns a folder and on the S3 server. Each may be stopped (SIGSTOP) for longer than its lease lasts, go on (SIGCONT),
and be killed. Afterwards a reader must find one of their models, the old one, or none; and merging again must give the
right bytes and leave nothing else; every tenth time that is done on a Ray cluster.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import ray

from benchmarks.machine import describe_machine
from support.failures.duel import Duels, duel_of
from support.failures.soak import Soak, recipe_of_five_shards, schedule_of
from support.models import ModelLibrary
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

_BUCKET = "soak"


def main() -> int:
    """Runs the schedules and prints what was made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--duels", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    arguments = parser.parse_args()
    print(describe_machine(Path.cwd()), flush=True)
    with tempfile.TemporaryDirectory() as folder, S3Server() as server:
        server.create_bucket(_BUCKET)
        library, bucket = ModelLibrary(Path(folder)), Bucket(server, f"s3://{_BUCKET}/soak")
        seeds = range(arguments.first, arguments.first + arguments.schedules)
        duels = range(arguments.first, arguments.first + arguments.duels)
        try:
            if seeds:
                _run_schedules(Soak(server, bucket.uri, recipe_of_five_shards(bucket, library)), seeds)
            if duels:
                with mock.patch.dict(os.environ, server.environment), RayCluster(num_nodes=2):
                    _run_duels(Path(folder), library, bucket, server, duels)
        except AssertionError as problem:
            print(problem, flush=True)
            return 1
    return 0


def _run_schedules(soak: Soak, seeds: range) -> None:
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for number in _counted("schedules", seeds):
        outcome = soak.run(schedule_of(number))
        faults += outcome.counts
        ends["published" if outcome.error is None else f"exit code {outcome.error.exit_code}"] += 1
    _print("Faults", faults)
    _print("Ends", ends)


def _run_duels(folder: Path, library: ModelLibrary, bucket: Bucket, server: S3Server, seeds: range) -> None:
    places = []
    for name in ("disk", "s3"):
        (folder / name).mkdir()
        here = bucket if name == "s3" else None
        address = ray.get_runtime_context().gcs_address
        places.append(Duels(folder / name, library, here, server.environment, address))
    ends: Counter[str] = Counter()
    for number in _counted("duels", seeds):
        ends[places[number % 2].run(duel_of(number))] += 1
    _print("Ends of first and second", ends)


def _counted(what: str, seeds: range) -> Iterator[int]:
    """The seeds, telling of every fiftieth."""
    began = time.perf_counter()
    for done, seed in enumerate(seeds, 1):
        yield seed
        if done % 50 == 0 or done == len(seeds):
            print(f"{done} {what} in {time.perf_counter() - began:.0f} s", flush=True)


def _print(title: str, counts: Counter[str]) -> None:
    print(f"{title}: {', '.join(f'{count} {name}' for name, count in counts.most_common())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
