"""What a worker asks for and what it holds, method by method; and that neither grows with the model.

    python -m benchmarks.memory [--methods linear ties] [--comfortable]   # | method | asked | used | ratio |
    python -m benchmarks.memory --shapes 1.1b 8b [--device cuda]          # peak memory by size of the model

Models are noise and outputs are thrown away (see `benchmarks.endless`). Inputs at ``noise://`` are read into buffers,
as from object stores; those in files, which the table needs some 3.3 GB of disk for, are mapped where they lie. Each
merge runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.endless import NOISE_BYTES, SHAPES, register, write_noise
from benchmarks.machine import describe_machine
from benchmarks.measure import measure
from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.registry import METHODS
from mergekit_ray.evaluation.device.names import CPU
from mergekit_ray.evaluation.strategy import Strategy, choose

GB = 1e9
STREAMED = [
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "breadcrumbs",
    "della",
    "sce",
    "model_stock",
]
"""Methods whose peak is measured by size of the model."""

_USUAL: Final[dict[str, Any]] = {"weight": 0.4, "density": 0.5, "t": 0.4, "select_topk": 0.5, "steps": 2}
"""Of parameters without a default, or whose default makes the work trivial or long."""

_ON_MATRICES: Final = ("iso_c", "iso_cts", "tsv_m", "wudi")
"""Methods that decompose matrices, which takes minutes where both sides are long."""

_RANK: Final = 512


def recipe(method: str, shape: str, num_models: int = 2, root: str = "noise://") -> str:
    """The recipe, as JSON, of a merge of models of a shape.

    Args:
        method: by its name.
        shape: of `SHAPES`.
        num_models: beside the base, as far as the method takes so many.
        root: what the paths of models begin with.
    """
    declared = METHODS.get(method)
    wanted = 1 if declared.base_is_input else num_models
    count = min(max(declared.min_models, wanted), declared.max_models or num_models)
    parameters: dict[str, dict[str, Any]] = {"model": {}, "global": {}}
    for name, scope in declared.parameter_names().items():
        if name in _USUAL:
            parameters[scope][name] = _USUAL[name]
    found: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "parameters": parameters["global"]}
    found["models"] = [
        {"model": f"{root}{shape}/{number}", "parameters": parameters["model"]} for number in range(1, count + 1)
    ]
    if declared.base is BaseUse.REQUIRED:
        found["base_model"] = f"{root}{shape}/0"
    return json.dumps(found)


def adapted_recipe(adapter: Path, shape: str) -> str:
    """The recipe, as JSON, of a base with an adapter; the adapter is written."""
    sizes = SHAPES[shape]
    layer = "base_model.model.model.layers.0.mlp."
    width, height = sizes.hidden, sizes.intermediate
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    shapes = {"gate_proj": (height, width), "up_proj": (height, width), "down_proj": (width, height)}
    for module, (rows, columns) in shapes.items():
        tensors[f"{layer}{module}.lora_A.weight"] = np.full((_RANK, columns), 0.01, np.float32)
        tensors[f"{layer}{module}.lora_B.weight"] = np.full((rows, _RANK), 0.01, np.float32)
    from safetensors.numpy import save_file  # noqa: PLC0415 - only this needs it

    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": list(shapes)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    models = [{"model": f"noise://{shape}/0+{adapter}"}]
    return json.dumps({"merge_method": "passthrough", "dtype": "bfloat16", "models": models})


def run_one(file: Path, device: str, memory: str | None = None) -> None:
    """Merge into nothing, in this process."""
    register()
    from mergekit_ray.cli import merge_main  # noqa: PLC0415 - as the command line does, in the measured process only

    budget = [] if memory is None else ["--memory", memory]
    sys.argv = ["merge", str(file), "discard://out", "--quiet", "--device", device, *budget]
    merge_main()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a merge asked for and what its worker held.

    Attributes:
        strategy: how the largest tensor is computed.
        asked_bytes: the budget it ran with.
        used_bytes: peak of anonymous memory, less the noise and what a process holds that has imported the same and
            does nothing.
    """

    strategy: Strategy
    asked_bytes: int
    used_bytes: int


def usage(file: Path, budget_of: Callable[[Plan], int]) -> Usage:
    """Run a recipe with the budget that its plan asks for."""
    import mergekit_ray  # noqa: PLC0415 - `register` comes first

    plan = mergekit_ray.plan(file)
    largest = max((tensor for shard in plan.shards for tensor in shard.tensors), key=lambda x: x.spec.num_bytes)
    strategy = choose(largest.expression, CPU).strategy
    asked = budget_of(plan)
    command = [sys.executable, "-m", "benchmarks.memory", "--run", str(file), "--memory", f"{asked}B"]
    held = measure(command, log=file.with_suffix(".log")).peak_anonymous_bytes
    idle = idle_bytes(file.with_suffix(".log"), with_torch=strategy is Strategy.TORCH)
    noise = NOISE_BYTES * sum(model.uri.startswith("noise://") for model in plan.inputs.values())
    return Usage(strategy, asked, held - idle - noise)


def idle_bytes(log: Path, *, with_torch: bool) -> int:
    """Anonymous memory of a process that has imported everything, torch only if asked for, and does nothing."""
    imports = f"import numba, numpy, mergekit_ray.operations.run_plan{', torch' if with_torch else ''}"
    command = [sys.executable, "-c", f"{imports}\nimport time; time.sleep(1)"]
    return measure(command, log=log).peak_anonymous_bytes


def cases(folder: Path, methods: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """What is measured: a name and a recipe."""

    def case(name: str, text: str) -> tuple[str, Path]:
        file = folder / f"{name.replace(' ', '-').replace(',', '')}.yml"
        file.write_text(text)
        return name, file

    for method in methods:
        shape = "square" if method in _ON_MATRICES else "tall"
        yield case(f"{method}, stores", recipe(method, shape))
        for number in range(3):
            if not (folder / shape / str(number)).exists():
                write_noise(f"noise://{shape}/{number}", folder / shape / str(number))
        yield case(f"{method}, files", recipe(method, shape, root=f"{folder}/"))
    if "ties" in methods:
        yield case("ties of 10, stores", recipe("ties", "tall", 10))
    if "passthrough" in methods:
        yield case(f"LoRA of rank {_RANK}, stores", adapted_recipe(folder / "adapter", "layer"))


def print_usage(methods: Sequence[str], *, comfortable: bool) -> None:
    """The table of what is asked and used."""
    from mergekit_ray.planning.windows import comfortable_memory, memory_needed  # noqa: PLC0415

    register()
    print("| method, inputs in | strategy | asked, MB | used, MB | ratio |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, file in cases(Path(folder), methods):
            found = usage(file, comfortable_memory if comfortable else memory_needed)
            megabytes = f"{found.asked_bytes / 1e6:.0f} | {found.used_bytes / 1e6:.0f}"
            ratio = f"{found.asked_bytes / found.used_bytes:.2f}" if found.used_bytes > 0 else "-"
            print(f"| {name} | {found.strategy} | {megabytes} | {ratio} |", flush=True)


def print_peaks(shapes: Sequence[str], methods: Sequence[str], device: str) -> None:
    """The table of peaks by size of the model."""
    print("| method | " + " | ".join(f"{shape}: anonymous GB, s" for shape in shapes) + " |")
    print("|---|" + "---|" * len(shapes))
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            cells = []
            for shape in shapes:
                file = Path(folder) / f"{method}.yml"
                file.write_text(recipe(method, shape))
                command = [sys.executable, "-m", "benchmarks.memory", "--run", str(file), "--device", device]
                found = measure(command, log=Path(folder) / "log")
                cells.append(f"{found.peak_anonymous_bytes / GB:.2f}, {found.wall_seconds:.1f}")
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), help="measure peaks by size of the model")
    parser.add_argument("--methods", nargs="*", choices=METHODS.names())
    parser.add_argument("--comfortable", action="store_true", help="with the usual budget instead of the least one")
    parser.add_argument("--device", default="cpu", help="what to compute on, as for merge; with --shapes")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_one(arguments.run, arguments.device, arguments.memory)
        return
    print(f"{describe_machine(Path(tempfile.gettempdir()))}")
    if arguments.shapes is not None:
        print_peaks(arguments.shapes, arguments.methods or STREAMED, arguments.device)
    else:
        print_usage(arguments.methods or METHODS.names(), comfortable=arguments.comfortable)


if __name__ == "__main__":
    main()
