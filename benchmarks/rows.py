"""What it costs to merge embeddings whose rows lie in another order than the result's, against the same in order.

    python -m benchmarks.rows [--rows 32000] [--columns 2048] [--turns 5]   # seconds, in files and in stores

Rows are shuffled, so that hardly two of them lie side by side. A store is simulated: it answers each request after
20 ms and sends 60 MB/s over each connection. What is written is thrown away, hashed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.endless import NOISE_BYTES, SHAPES, DiscardSink, NoiseSource
from benchmarks.machine import describe_machine
from benchmarks.measure import measure
from benchmarks.memory import idle_bytes
from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load, Merge, Runs, gathered
from mergekit_ray.core.plan import InputFile, InputModel, Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.windows import comfortable_memory, memory_needed
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.protocols import FileStat, Source, WritableBuffer
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.transfers import RangeReader
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker

NUM_MODELS: Final = 2
_TENSOR: Final = "model.embed_tokens.weight"
_ANSWER_SECONDS: Final = 0.02
_BYTES_PER_SECOND: Final = 60e6


class SlowStore:
    """A folder as if it were far away."""

    def __init__(self, folder: Path) -> None:
        self._files = LocalSource(folder)
        self._reader = RangeReader("slow")
        self.uri = f"slow://{folder}"

    def list(self) -> list[FileStat]:
        """See `Source.list`."""
        return self._files.list()

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        return self._files.stat(name)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return self._files.read(name, max_bytes=max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        return self._files.read_head(name, num_bytes)

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`."""

        def fetch(one: Fetch) -> None:
            time.sleep(_ANSWER_SECONDS + (one.end - one.start) / _BYTES_PER_SECOND)
            wanted = [(start, start + len(buffer)) for start, buffer in one.pieces]
            self._files.read_ranges(name, wanted, [buffer for _, buffer in one.pieces], version=version)

        return self._reader.read(ranges, buffers, fetch)


def plan_of(sources: Mapping[str, Source], *, is_shuffled: bool) -> Plan:
    """The mean of the models' embeddings; of all but the first, in another order."""
    inputs, loads = {}, []
    for key, source in sources.items():
        stat = next(stat for stat in source.list() if stat.name.endswith(".safetensors"))
        inputs[key] = InputModel(key, key, source.uri, {stat.name: InputFile(stat.name, stat.num_bytes, stat.version)})
        loads.append(Load(key, *read_header(source, stat.name).tensors[_TENSOR]))
    spec = loads[0].spec
    num_rows = spec.shape[0]
    generator = np.random.default_rng(0)
    orders = [np.arange(num_rows), *(generator.permutation(num_rows) for _ in loads[1:])]
    leaves = [
        gathered([load], spec, Runs.of_rows(np.zeros(num_rows, np.int64), order if is_shuffled else orders[0]))
        for load, order in zip(loads, orders, strict=True)
    ]
    of_models = tuple({"weight": 0.5} for _ in leaves)
    merge = Merge("linear", spec, tuple(leaves), None, {}, of_models, ("",) * len(leaves))
    [shard] = partition([[spec]], {spec.name: merge}, 1 << 50)
    return Plan(inputs, (shard,), {}, (), {}, 0)


def run(plan: Plan, sources: Mapping[str, Source], memory_bytes: int) -> float:
    """Carry a plan out, into nothing; the seconds of it."""
    worker = Worker(
        Resources(plan.inputs, sources, WorkerOptions(memory_bytes, num_threads=2)),
        DiscardSink("discard://"),
        "records",
    )
    began = time.perf_counter()
    worker.run(plan.shards[0])
    seconds = time.perf_counter() - began
    worker.close()
    return seconds


def noise(shape: str) -> dict[str, Source]:
    """Models in a store that answers at once."""
    return {str(number): NoiseSource(f"noise://{shape}/{number}") for number in range(NUM_MODELS)}


def usage(shape: str, budget_of: Callable[[Plan], int], log: Path) -> tuple[int, int]:
    """The budget that the plan of shuffled rows asks for, and what its worker holds, see `benchmarks.memory.Usage`."""
    asked = budget_of(plan_of(noise(shape), is_shuffled=True))
    command = [sys.executable, "-m", "benchmarks.rows", "--run", shape, "--memory", str(asked)]
    held = measure(command, log=log).peak_anonymous_bytes
    return asked, held - idle_bytes(log, with_torch=False) - NOISE_BYTES * NUM_MODELS


def _print_seconds(num_rows: int, num_columns: int, turns: int) -> None:
    spec = TensorSpec(_TENSOR, DType.BF16, (num_rows, num_columns))
    with tempfile.TemporaryDirectory() as folder:
        print(describe_machine(Path(folder)))
        paths = [Path(folder) / str(number) for number in range(NUM_MODELS)]
        for number, path in enumerate(paths):
            path.mkdir()
            values = np.random.default_rng(number).standard_normal(spec.num_elements, np.float32)
            data = (values.view(np.uint32) >> 16).astype(np.uint16)
            (path / "model.safetensors").write_bytes(encode_header([spec]) + data.tobytes())
        print(f"{num_rows} x {num_columns} in bfloat16, {NUM_MODELS} models, the quickest of {turns} turns")
        for place, source_of in (("files", LocalSource), ("stores", SlowStore)):
            sources: dict[str, Source] = {path.name: source_of(path) for path in paths}
            plans = {name: plan_of(sources, is_shuffled=name == "shuffled") for name in ("in order", "shuffled")}
            for budget_of in (memory_needed, comfortable_memory):
                seconds: dict[str, list[float]] = {name: [] for name in plans}
                for _ in range(turns):
                    for name, plan in plans.items():
                        seconds[name].append(run(plan, sources, budget_of(plan)))
                best = {name: min(found) for name, found in seconds.items()}
                ratio = best["shuffled"] / best["in order"]
                shown = ", ".join(f"{name} {found:.2f} s" for name, found in best.items())
                print(f"{place}, {budget_of.__name__}: {shown}, ratio {ratio:.2f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", choices=sorted(SHAPES), help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        sources = noise(arguments.run)
        run(plan_of(sources, is_shuffled=True), sources, arguments.memory)
        return
    _print_seconds(arguments.rows, arguments.columns, arguments.turns)


if __name__ == "__main__":
    main()
