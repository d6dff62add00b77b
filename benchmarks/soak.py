"""Many merges from S3 to S3, each through a proxy that fails by a schedule drawn from a seed.

    PYTHONPATH=tests python -m benchmarks.soak [--schedules 1000] [--first 0]

Between the client and a real S3 server (SeaweedFS) requests are answered with 500, 503 and 429, connections reset,
answers lost, bodies cut short, slowed or changed by a bit, credentials expire, single requests are denied. What passes
must be absorbed; what lasts must end in an error that says what to do, with nothing published; run again without the
proxy, every output must be the bytes of an undisturbed merge, and no unfinished upload may stay behind. The first
schedule that breaks this is named and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import describe_machine
from support.models import ModelLibrary
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.soak import Soak, recipe_of_five_shards, schedule_of

_BUCKET = "soak"


def main() -> int:
    """Runs the schedules and prints what was made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    arguments = parser.parse_args()
    print(describe_machine(Path.cwd()), flush=True)
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, S3Server() as server:
        server.create_bucket(_BUCKET)
        prefix = f"s3://{_BUCKET}/soak"
        soak = Soak(server, prefix, recipe_of_five_shards(Bucket(server, prefix), ModelLibrary(Path(folder))))
        for seed in range(arguments.first, arguments.first + arguments.schedules):
            try:
                outcome = soak.run(schedule_of(seed))
            except AssertionError as problem:
                print(f"seed {seed}: {problem}", flush=True)
                return 1
            faults += outcome.counts
            ends["published" if outcome.error is None else f"exit code {outcome.error.exit_code}"] += 1
            done = seed - arguments.first + 1
            if done % 50 == 0 or done == arguments.schedules:
                print(f"{done} schedules in {time.perf_counter() - began:.0f} s, {faults.total()} faults", flush=True)
    for title, counts in (("Faults", faults), ("Ends", ends)):
        print(f"{title}: {', '.join(f'{count} {name}' for name, count in counts.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
