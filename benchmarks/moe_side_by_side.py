"""mergekit-moe and mergekit-ray on the same Mixture of Experts, run in turns on one machine.

    python -m benchmarks.moe_side_by_side --mergekit-python .venv-mergekit/bin/python

Four Llama experts of 0.5B parameters become a Mixtral of 1.5B, with random routers and with routers from the prompts'
embeddings. Inputs are in the page cache, outputs are deleted and synced away between runs, the contenders alternate.
Each contender's start-up is what it takes for models that are next to nothing.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import mergekit_ray
from benchmarks.llama_1b import is_whole, weight_files
from benchmarks.machine import describe_machine, describe_versions, touch_memory
from benchmarks.measure import CommandError, Measurement, measure
from benchmarks.side_by_side import COPY_BYTES, GB, MERGEKIT, OURS, read_all

NUM_EXPERTS = 4
GATE_MODES = ("random", "cheap_embed")
ROUTER_SLACK_BYTES = 1 << 20
"""Routers, headers and paddings: what files may differ by from the sum of the other tensors."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's.

    Attributes:
        name: of the folder of its models.
        num_layers, hidden, inner, heads, vocabulary: as in its config.
    """

    name: str
    num_layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int

    def frame(self) -> dict[str, tuple[int, ...]]:
        """Tensors outside the feed-forward layers."""
        made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}"
            made |= {f"{at}.self_attn.{x}_proj.weight": (self.hidden, self.hidden) for x in "qkvo"}
            made |= {f"{at}.{norm}_layernorm.weight": (self.hidden,) for norm in ("input", "post_attention")}
        return {**made, "model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def feed_forward(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the feed-forward layers."""
        wide, narrow = (self.inner, self.hidden), (self.hidden, self.inner)
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        at = "model.layers.{}.mlp.{}.weight".format
        return {at(layer, name): shape for layer in range(self.num_layers) for name, shape in shapes.items()}

    @property
    def output_bytes(self) -> int:
        """Of the Mixture of Experts in bfloat16, routers left out."""
        frame, experts = (sum(torch.Size(s).numel() for s in x.values()) for x in (self.frame(), self.feed_forward()))
        return 2 * (frame + NUM_EXPERTS * experts)

    def config(self) -> dict[str, object]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FULL = Shape("llama-0.5b", num_layers=24, hidden=1024, inner=4608, heads=16, vocabulary=32000)
TINY = Shape("llama-tiny", num_layers=2, hidden=32, inner=64, heads=4, vocabulary=128)


@dataclass
class Results:
    """Measurements by gate mode and contender; start-ups alike; the floor's seconds by gate mode."""

    runs: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)
    startups: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)


def make_models(shape: Shape, folder: Path) -> list[Path]:
    """Makes four models with random weights and a tokenizer of as many words as fit, unless they are there."""
    models = [folder / shape.name / f"expert-{number}" for number in range(NUM_EXPERTS)]
    for number, model in enumerate(models):
        if (model / "model.safetensors").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(shape.config(), indent=2))
        save_tokenizer(model, shape.vocabulary)
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.randn(size, generator=generator).mul_(0.02).bfloat16()
            for name, size in {**shape.frame(), **shape.feed_forward()}.items()
        }
        unfinished = model / "unfinished"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.rename(model / "model.safetensors")
        print(f"made {model}", flush=True)
    return models


def save_tokenizer(model: Path, vocabulary: int) -> None:
    """A tokenizer of numbered words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(vocabulary - 4))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(model)


def recipe(gate_mode: str, models: Sequence[Path]) -> str:
    """YAML that both read."""
    experts = [
        {"source_model": str(model), "positive_prompts": [f"w{8 * number + i} w{8 * number + i + 1}" for i in range(4)]}
        for number, model in enumerate(models)
    ]
    data = {"base_model": str(models[0]), "gate_mode": gate_mode, "dtype": "bfloat16", "experts": experts}
    return yaml.safe_dump(data, sort_keys=False)


def command_of(contender: str, config: Path, output: Path, mergekit_python: Path) -> list[str]:
    """The command line by which ``contender`` makes the Mixture of Experts."""
    if contender == OURS:
        entry = "from mergekit_ray.cli import merge_main; merge_main()"
        return [sys.executable, "-c", entry, str(config), str(output), "--quiet"]
    program = str(mergekit_python.parent / "mergekit-moe")
    return [program, str(config), str(output), "--quiet", "--i-understand-this-is-not-useful-without-training"]


def run_once(
    gate_mode: str, contender: str, shape: Shape, models: Sequence[Path], work: Path, mergekit_python: Path
) -> Measurement:
    """One run of one contender; its output is checked for completeness, then deleted.

    Raises:
        CommandError: the command failed or left incomplete files.
    """
    config, output = work / f"moe-{gate_mode}.yml", work / "output"
    config.write_text(recipe(gate_mode, models))
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # one contender's dirty pages must not be flushed during the other's run
    for model in models:
        read_all(weight_files(model))
    measurement = measure(
        command_of(contender, config, output, mergekit_python),
        log=work / f"moe-{gate_mode}-{contender}.log",
        environment={"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    written = weight_files(output)
    found = sum(file.stat().st_size for file in written)
    if not 0 <= found - shape.output_bytes <= ROUTER_SLACK_BYTES or not all(is_whole(file) for file in written):
        raise CommandError(f"{contender} left {found} bytes in {output}, expected about {shape.output_bytes}")
    shutil.rmtree(output)
    return measurement


def floor_seconds(shape: Shape, models: Sequence[Path], work: Path) -> float:
    """What cannot be beaten: ``cat`` of the inputs from the page cache and a write of as much as the result holds."""
    files = [file for model in models for file in weight_files(model)]
    block = os.urandom(min(COPY_BYTES, shape.output_bytes))
    target = work / "floor.bin"
    os.sync()
    start = time.perf_counter()
    read_all(files)
    with target.open("wb", buffering=0) as stream:
        for _ in range(shape.output_bytes // len(block)):
            stream.write(block)
    elapsed = time.perf_counter() - start
    target.unlink()
    return elapsed


def table(results: Results) -> str:
    """Results as a markdown table; a contender's own time over the floor leaves its start-up out."""
    lines = [
        "| gate_mode | contender | wall s, best | median | start-up s | CPU s | peak RSS GB | anonymous GB | floor s "
        "| over floor | times faster |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (gate_mode, contender), runs in results.runs.items():
        best = min(runs, key=lambda run: run.wall_seconds)
        floor = min(results.floors[gate_mode])
        startup = min(run.wall_seconds for run in results.startups[gate_mode, contender])
        theirs = results.runs.get((gate_mode, MERGEKIT))
        faster = f"{min(run.wall_seconds for run in theirs) / best.wall_seconds:.1f}" if theirs else ""
        lines.append(
            f"| {gate_mode} | {contender} | {best.wall_seconds:.1f} "
            f"| {statistics.median(run.wall_seconds for run in runs):.1f} | {startup:.1f} | {best.cpu_seconds:.1f} "
            f"| {best.peak_rss_bytes / GB:.2f} | {best.peak_anonymous_bytes / GB:.2f} | {floor:.1f} "
            f"| {max(0.0, best.wall_seconds - startup) / floor:.1f}x | {faster} |"
        )
    return "\n".join(lines)


def measure_all(arguments: argparse.Namespace, contenders: Sequence[str], mergekit_python: Path) -> Results:
    """Everything, contenders in turns."""
    work, results = arguments.work.resolve(), Results()
    sizes = [(TINY, make_models(TINY, work / "models"))]
    if not arguments.tiny:
        sizes.append((FULL, make_models(FULL, work / "models")))
    for repeat in range(arguments.repeats):
        for gate_mode in arguments.only or GATE_MODES:
            shape, models = sizes[-1]
            results.floors.setdefault(gate_mode, []).append(floor_seconds(shape, models, work))
            for contender in contenders:
                # Start-up first: whatever a first run leaves in caches is there for both.
                for kind, (size, inputs) in ((results.startups, sizes[0]), (results.runs, sizes[-1])):
                    run = run_once(gate_mode, contender, size, inputs, work, mergekit_python)
                    kind.setdefault((gate_mode, contender), []).append(run)
                last = results.runs[gate_mode, contender][-1]
                print(
                    f"{repeat + 1}/{arguments.repeats} {gate_mode} {contender}: {last.wall_seconds:.1f} s wall, "
                    f"{last.cpu_seconds:.1f} s CPU, {last.peak_anonymous_bytes / GB:.2f} GB anonymous",
                    flush=True,
                )
    return results


def main() -> None:
    """Measures, prints the table, writes everything measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for models and outputs: 8 GB")
    parser.add_argument("--mergekit-python", type=Path, default=Path(".venv-mergekit/bin/python"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=GATE_MODES, help="gate modes to measure")
    parser.add_argument("--contenders", nargs="*", choices=["mergekit", "ours"], default=["mergekit", "ours"])
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try the benchmark")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    # Not resolved: a virtual environment's python is a link, and its folder is what holds mergekit-moe.
    mergekit_python: Path = arguments.mergekit_python.absolute()
    # As pip does with what it installs: a checkout's modules may not have been compiled yet.
    compileall.compile_dir(str(Path(mergekit_ray.__file__).parent), quiet=1)
    called = {"mergekit": MERGEKIT, "ours": OURS}
    touch_memory()
    results = measure_all(arguments, [called[name] for name in arguments.contenders], mergekit_python)

    machine, versions = describe_machine(arguments.work.resolve()), describe_versions(mergekit_python)
    print(f"\n{machine}\n{versions}\n\n{table(results)}")
    report = {
        "machine": machine,
        "versions": versions,
        "floor_seconds": results.floors,
        "runs": [
            {"gate_mode": gate_mode, "contender": contender, "kind": kind, **run.to_json()}
            for kind, measured in (("start-up", results.startups), ("run", results.runs))
            for (gate_mode, contender), runs in measured.items()
            for run in runs
        ],
    }
    file = arguments.work / "moe_side_by_side.json"
    file.write_text(json.dumps(report, indent=2))
    print(f"\nAll runs: {file}")


if __name__ == "__main__":
    main()
