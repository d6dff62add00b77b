"""What common tokens cost: models of 1.1B with equal tokenizers, and such that are brought to common tokens first.

    python -m benchmarks.tokenizers FOLDER [--turns 5]   # 9 GB of models below FOLDER, kept

The contenders run in turns. Inputs are in the page cache, and times include start-up.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Final

from benchmarks.llama_1b import VOCABULARY, make_models, weight_files
from benchmarks.machine import describe_machine
from benchmarks.measure import Measurement, measure

_NUM_ADDED: Final = 100
CONTENDERS: Final = {
    "equal tokenizers": ("tune-a", "same"),
    "100 tokens added by each": ("tune-a", "added"),
    "all ids in another order": ("tune-a", "shuffled"),
}


def vocabularies() -> dict[str, list[str]]:
    """The tokens of each model, by their ids."""
    words = [f"w{number}" for number in range(VOCABULARY - _NUM_ADDED)]
    shuffled = random.Random(0).sample(words, len(words))
    added = {name: [f"<|{name}{number}|>" for number in range(_NUM_ADDED)] for name in ("a", "b")}
    return {
        "tune-a": [*words, *added["a"]],
        "same": [*words, *added["a"]],
        "added": [*words, *added["b"]],
        "shuffled": [*shuffled, *added["a"]],
    }


def place_models(folder: Path) -> dict[str, Path]:
    """Links to two models' weights, with a tokenizer for each contender beside them."""
    _, a, b, _ = make_models(folder / "weights")
    places = {}
    for name, tokens in vocabularies().items():
        place = places[name] = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file in (a if name == "tune-a" else b).iterdir():
            (place / file.name).hardlink_to(file.resolve())
        model = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "w0"}
        (place / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return places


def run(name: str, places: dict[str, Path], folder: Path) -> Measurement:
    """One merge."""
    models = [{"model": str(places[model]), "parameters": {"weight": 0.5}} for model in CONTENDERS[name]]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16", "tokenizer_source": "union"}
    file, out = folder / "recipe.json", folder / "out"
    file.write_text(json.dumps(recipe))
    shutil.rmtree(out, ignore_errors=True)
    program = [sys.executable, "-c", "from mergekit_ray.cli import merge_main; merge_main()"]
    return measure([*program, str(file), str(out), "--quiet"], log=folder / "log")


def main() -> None:
    """Prints a line for each contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    places = place_models(options.folder)
    print(describe_machine(options.folder))
    for place in places.values():
        for file in weight_files(place):
            file.read_bytes()
    found: dict[str, list[Measurement]] = {name: [] for name in CONTENDERS}
    for _ in range(options.turns):
        for name, measured in found.items():
            measured.append(run(name, places, options.folder))
    first = min(each.wall_seconds for each in found["equal tokenizers"])
    for name, measured in found.items():
        walls = [each.wall_seconds for each in measured]
        memory = max(each.peak_anonymous_bytes for each in measured) / 1e9
        print(
            f"{name:<26} best {min(walls):5.2f} s, median {statistics.median(walls):5.2f} s, "
            f"{min(walls) / first:4.2f} times, anonymous memory {memory:4.2f} GB"
        )


if __name__ == "__main__":
    main()
