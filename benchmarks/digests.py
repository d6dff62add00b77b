"""SHA-256 of what a set of merges writes: to see that a change of the code changes no byte.

    PYTHONPATH=tests python -m benchmarks.digests before.json      # at one commit
    PYTHONPATH=tests python -m benchmarks.digests after.json       # at another, on the same machine
    diff before.json after.json

Every merge method in several dtypes, adapters, slices, a gradient, and every family of Mixtures of
Experts, on small models. Bits may differ between kinds of processor, so both runs need the same machine; random masks
depend on the models' paths, so both need the same ``--work``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mergekit_ray
from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.core.registry import METHODS
from support.adapters import make_adapter, quiet
from support.models import ModelLibrary, build
from support.moe_cases import CASES, expert

USUAL: dict[str, Any] = {"weight": 0.6, "density": 0.55, "t": 0.35}
"""Of parameters that have no default."""

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
_SKIPPED = ("README.md", "mergekit-ray.json")  # name versions


def dense(folders: list[str], options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A recipe for every method."""
    base, *others = folders
    for name in METHODS.names():
        method = METHODS.get(name)
        count = max(method.min_models, min(method.max_models or 3, 3))
        per_model = {
            key: USUAL[key] for key, scope in method.parameter_names().items() if scope == "model" and key in USUAL
        }
        overall = {
            key: USUAL[key] for key, scope in method.parameter_names().items() if scope == "global" and key in USUAL
        }
        recipe: dict[str, Any] = {"merge_method": name, "seed": 3, "parameters": overall, **options}
        recipe["models"] = [
            {
                "model": folder,
                "parameters": {**per_model, **({"weight": 0.3 + 0.2 * k} if "weight" in per_model else {})},
            }
            for k, folder in enumerate(others[:count])
        ]
        if method.base is not BaseUse.FORBIDDEN:
            recipe["base_model"] = base
        yield name, recipe


def recipes(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """All recipes, by a name that says what they are."""
    library = ModelLibrary(work / "models")
    sizes: dict[str, Any] = {"num_layers": 2, "vocab_size": 2048, "hidden_size": 160}
    models = {
        name: [str(library.get("llama", k, dtype=dtype, tied=False, **sizes)) for k in range(4)]
        for name, dtype in DTYPES.items()
    }
    for dtype, folders in models.items():
        for name, recipe in dense(folders, {}):
            yield f"{name} {dtype}", recipe
    mixed = [models["bf16"][0], models["f32"][1], models["f16"][2], models["bf16"][3]]
    for name, recipe in dense(mixed, {"dtype": "bfloat16"}):
        yield f"{name} mixed to bf16", recipe
    for name, recipe in dense(models["f32"], {"dtype": "bfloat16", "out_dtype": "float16"}):
        yield f"{name} f32 by bf16 to f16", recipe
    for name, recipe in dense(models["bf16"], {"compute_dtype": "float64"}):
        yield f"{name} in f64", recipe
    a, b, c, d = models["bf16"]
    torch.manual_seed(0)
    with quiet():
        shape: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 2048, "hidden_size": 160}
        adapter = make_adapter(build("llama", **shape), work / "adapter", target_modules=["q_proj", "down_proj"])
    yield "adapter", {"merge_method": "linear", "models": [{"model": f"{a}+{adapter}"}], "parameters": {"weight": 1.0}}
    yield (
        "slices",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": b, "layer_range": [0, 2]}]},
                {"sources": [{"model": c, "layer_range": [1, 2]}]},
            ],
        },
    )
    weights = [[0.0, 0.7, 1.0], [{"filter": "mlp", "value": 0.2}, {"value": [1.0, 0.4]}]]
    listed = [{"model": model, "parameters": {"weight": weight}} for model, weight in zip((b, d), weights, strict=True)]
    yield "gradient and filter", {"merge_method": "linear", "models": listed}
    for name, case in CASES.items():
        base, first, second = (library.get(case.dense, k, num_layers=2) for k in range(3))
        yield name, case.recipe(base, expert(first), expert(second, noise_scale=0.1), seed=5)
        yield f"{name}, bf16", case.recipe(base, expert(first), expert(second), seed=5, dtype="bfloat16")
    for family, kind in (("llama", "deepseek"), ("gemma2", "custom"), ("phi", "custom"), ("gpt_neox", "custom")):
        base, first, second = (library.get(family, k, num_layers=2) for k in range(3))
        yield (
            f"{kind} of {family}",
            {
                "base_model": str(base),
                "architecture": kind,
                "gate_mode": "random",
                "seed": 5,
                "experts": [expert(first), expert(second)],
            },
        )
    words = [library.get("llama", k, num_layers=2, with_tokenizer=True) for k in range(3)]
    for mode in ("hidden", "hidden_avg", "cheap_embed"):
        experts = [expert(words[1], positive_prompts=["the capital"]), expert(words[2], positive_prompts=["of France"])]
        yield f"gate_mode {mode}", {"base_model": str(words[0]), "gate_mode": mode, "experts": experts}


def main() -> int:
    """Merge all, write a JSON object of digests by merge and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".bench/digests"), help="models, and results for a moment")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    digests: dict[str, Any] = {}
    out = work / "out"
    for name, recipe in recipes(work):
        try:
            mergekit_ray.merge(recipe, out, device="cpu")
        except MergekitRayError as error:
            digests[name] = f"{type(error).__name__}: {error}"
        else:
            digests[name] = {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in sorted(out.iterdir())
                if file.is_file() and file.name not in _SKIPPED
            }
        shutil.rmtree(out, ignore_errors=True)
    arguments.output.write_text(json.dumps(digests, indent=1) + "\n")
    sys.stdout.write(f"{len(digests)} merges\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
