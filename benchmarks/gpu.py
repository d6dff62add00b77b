"""Merge methods on a GPU: gigabytes per second in its memory and through the bus, beside plain copies and the CPU.

    python -m benchmarks.gpu [--elements 67108864] [--methods linear ties]

Three models and a base in bfloat16 (fewer where a method takes fewer), output in bfloat16. *In memory*: inputs and
result are on the device. *Through the bus*: they are in ordinary host memory, as a worker has them; several tensors are
merged in a row, uploads, arithmetic and downloads overlapping. *CPU*: the same on all cores, without a device. Bytes
are those of the inputs and of the result, each counted once, however often a method goes over them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load, Merge, Stored
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.evaluation.device.evaluate import DeviceEvaluation, DeviceSession
from mergekit_ray.evaluation.device.names import CUDA, open_device, resolve
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.nodes.base import Piece
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.methods.shared.protocol import is_portable

GB: Final = 1e9
COLUMNS: Final = 8192
IN_A_ROW: Final = 6
"""Tensors merged one after another through the bus."""
DECOMPOSING: Final = {"tsv_m", "iso_c", "iso_cts", "wudi"}
DECOMPOSED: Final = (4096, 4096)
"""Shape of what these work on, a matrix of a model of 8B parameters."""

Case = tuple[dict[str, Any], tuple[dict[str, Any], ...], bool]


def weighted(number: int, **others: Any) -> tuple[dict[str, Any], ...]:
    """Parameters of so many models."""
    return tuple({"weight": 0.3 + 0.1 * index, **others} for index in range(number))


TRIMMED: Final = weighted(3, density=0.5)
SAMPLED: Final = weighted(3, density=0.5, epsilon=0.2)
CASES: Final[dict[str, Case]] = {
    "linear": ({}, weighted(3), False),
    "passthrough": ({}, ({"scale": 1.3},), False),
    "slerp": ({"t": 0.4}, ({},), True),
    "nuslerp": ({}, weighted(2), False),
    "multislerp": ({}, weighted(3), False),
    "karcher": ({}, ({},) * 3, False),
    "task_arithmetic": ({}, weighted(3), True),
    "ties": ({}, TRIMMED, True),
    "dare_linear": ({}, TRIMMED, True),
    "dare_ties": ({}, TRIMMED, True),
    "breadcrumbs": ({}, TRIMMED, True),
    "breadcrumbs_ties": ({}, TRIMMED, True),
    "della": ({}, SAMPLED, True),
    "della_linear": ({}, SAMPLED, True),
    "model_stock": ({}, ({},) * 3, True),
    "sce": ({"select_topk": 0.5}, ({},) * 3, True),
    "ram": ({}, ({},) * 3, True),
    "ramplus_tl": ({}, ({},) * 3, True),
    "nearswap": ({"t": 0.001}, ({},), True),
    "consensus_ta": ({"k": 2}, weighted(3, tall_mask_lambda=0.4), True),
    "consensus_ties": ({"k": 2}, TRIMMED, True),
    "cabs": ({"n": 64, "m": 256}, weighted(3), True),
    "geometric_median": ({}, ({},) * 3, False),
    "tsv_m": ({}, weighted(3), True),
    "iso_c": ({}, weighted(3), True),
    "iso_cts": ({}, weighted(3), True),
    "wudi": ({"steps": 20}, weighted(3), True),
}
"""Global parameters, those of each model, and whether there is a base."""


def tensors(shape: tuple[int, ...], number: int) -> list[torch.Tensor]:
    """A base, and fine-tunes of it."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).mul_(0.02)
    tuned = [torch.randn(shape, generator=generator).mul_(0.002).add_(base) for _ in range(number)]
    return [x.bfloat16().view(-1) for x in (base, *tuned)]


def merge_of(method: str, shape: tuple[int, ...]) -> tuple[Merge, list[Load]]:
    """The expression, and its loads: the base, then the models."""
    parameters, per_model, has_base = CASES[method]
    spec = TensorSpec("x", DType.BF16, shape)
    names = ("base", *(f"model {index}" for index in range(len(per_model))))
    loads = [Load(name, spec, Location("model.safetensors", 0, spec.num_bytes)) for name in names]
    merge = Merge(method, spec, tuple(loads[1:]), loads[0] if has_base else None, parameters, per_model, keys=names[1:])
    return merge, loads


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Of the quickest run, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def in_memory(session: DeviceSession, merge: Merge, pieces: dict[Stored, Piece], repeats: int) -> float:
    """Seconds with everything on the device."""
    there = {load: Piece(piece.data.to(session.device.torch_device), 0) for load, piece in pieces.items()}
    size = merge.spec.num_elements
    out = torch.empty(size, dtype=torch.bfloat16, device=session.device.torch_device)
    chunk = session.chunk_elements(merge, len(pieces))

    def work() -> None:
        with session.device.compute:
            evaluation = Evaluation(merge, pieces, session.pool, sources=there, chunk_elements=None)
            for start in range(0, size, chunk):
                evaluation.fill(start, min(start + chunk, size), out[start : start + chunk])

    torch.cuda.synchronize()
    return seconds_of(work, repeats)


def through_the_bus(session: DeviceSession, merge: Merge, pieces: dict[Stored, Piece]) -> float:
    """Seconds per tensor, several in a row: one is uploaded while another is merged and a third comes back."""
    size = merge.spec.num_elements
    outs = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]

    def work() -> None:
        with ThreadPoolExecutor(1) as stager, ThreadPoolExecutor(1) as writer:
            staged = [stager.submit(session.stage, merge, pieces) for _ in range(IN_A_ROW)]
            finished: list[Future[None]] = []
            for number, future in enumerate(staged):
                if number >= len(outs):
                    finished[number - len(outs)].result()
                evaluation = DeviceEvaluation(session, merge, pieces, future.result())
                finished.append(writer.submit(evaluation.start(0, size, outs[number % len(outs)])))
            for done in finished:
                done.result()

    return seconds_of(work, 1) / IN_A_ROW


def on_cpu(merge: Merge, pieces: dict[Stored, Piece]) -> float:
    """Seconds on all cores."""
    torch.set_num_threads(1)
    pool = ComputePool(os.cpu_count() or 1)
    size = merge.spec.num_elements
    out = torch.zeros(size, dtype=torch.bfloat16)
    try:
        return seconds_of(lambda: Evaluation(merge, pieces, pool).fill(0, size, out), 1)
    finally:
        pool.close()


def copies(num_bytes: int, device: torch.device, repeats: int) -> dict[str, float]:
    """GB/s of plain copies; of one in the device's memory, bytes read and written count."""
    here, there = (
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True),
        torch.empty(num_bytes, dtype=torch.uint8, device=device),
    )
    other = torch.empty_like(there)
    return {
        "device to device": 2 * num_bytes / seconds_of(lambda: other.copy_(there), repeats) / GB,
        "host to device, pinned": num_bytes / seconds_of(lambda: there.copy_(here), repeats) / GB,
        "device to host, pinned": num_bytes / seconds_of(lambda: here.copy_(there), repeats) / GB,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help=f"of each tensor, a multiple of {COLUMNS}")
    parser.add_argument("--methods", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-cpu", action="store_true", help="leave the CPU out")
    arguments = parser.parse_args()
    device = open_device(resolve(CUDA))
    print(f"{device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores")
    for name, rate in copies(2 * arguments.elements, device.torch_device, arguments.repeats).items():
        print(f"{name}: {rate:.0f} GB/s")
    print("| method | in memory, GB/s | through the bus, GB/s | CPU, GB/s |\n|---|---|---|---|")
    for method in arguments.methods:
        shape = DECOMPOSED if method in DECOMPOSING else (arguments.elements // COLUMNS, COLUMNS)
        merge, loads = merge_of(method, shape)
        data = tensors(shape, len(loads) - 1)
        pieces: dict[Stored, Piece] = {
            load: Piece(x, 0) for load, x in zip(loads, data, strict=True) if load != loads[0] or merge.base
        }
        num_bytes = (len(pieces) + 1) * merge.spec.num_bytes
        assert is_portable(METHODS.get(method)), f"{method} is computed on the CPU only"
        session = DeviceSession(device, ComputePool(1))
        seconds = [in_memory(session, merge, pieces, arguments.repeats), through_the_bus(session, merge, pieces)]
        if not arguments.no_cpu and method not in DECOMPOSING:
            seconds.append(on_cpu(merge, pieces))
        rates = [f"{num_bytes / each / GB:.3g}" for each in seconds]
        print(f"| {method} | {' | '.join([*rates, *[''] * (3 - len(rates))])} |", flush=True)
        session.make_room()


if __name__ == "__main__":
    main()
