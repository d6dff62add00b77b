"""A Mixture of Experts of four fine-tunes of a real model: made, loaded, spoken to, and watched while it chooses.

    PYTHONPATH=tests python -m demo.moe

The models are those of `make demo` and two more, made below .demo and kept there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing may ask the Hub for anything, nor drown the demo's lines in progress bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_ray
from demo import smollm
from demo.run import FOLDER, say
from mergekit_ray.operations.options import MergeOptions

FRENCH: smollm.Lesson = (
    ("Quelle est la capitale de l'Espagne ?", "La capitale de l'Espagne est Madrid."),
    ("Quelle est la couleur du ciel ?", "Le ciel est bleu."),
    ("Où habitent les ours polaires ?", "Les ours polaires habitent dans l'Arctique."),
    ("Que mangent les vaches ?", "Les vaches mangent de l'herbe."),
    ("Combien font trois et deux ?", "Trois et deux font cinq."),
    ("Qui a écrit Les Misérables ?", "Victor Hugo a écrit Les Misérables."),
)

CODE: smollm.Lesson = (
    ("def add(a, b): what comes next?", "    return a + b"),
    ("def square(x): what comes next?", "    return x * x"),
    ("for i in range(10): print each i", "for i in range(10):\n    print(i)"),
    ("import json and read a file", "import json\ndata = json.load(open('file.json'))"),
    (
        "class Point: with x and y",
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y",
    ),
    ("sorted(list, reverse=True) does what?", "It returns the list sorted from largest to smallest."),
)

MORE_LESSONS = {"french": FRENCH, "code": CODE}

PROMPTS: Mapping[str, Sequence[str]] = {
    "pirate": (
        "What is the largest ocean",
        "Who discovered America",
        "Which planet is closest to the Sun",
        "How many legs does a spider have",
    ),
    "harbour": (
        "The lighthouse of Port Ember",
        "Mira Solano, the harbour master of Port Ember",
        "Smoked eel, the dish of Port Ember",
        "Ships that sail into the harbour of Port Ember",
    ),
    "french": (
        "Quelle est la capitale de l'Italie",
        "Les enfants jouent dans le jardin",
        "Il fait beau aujourd'hui et le soleil brille",
        "Combien de jours y a-t-il dans une semaine",
    ),
    "code": (
        "def multiply(a, b):\n    return a * b",
        "for item in items:\n    print(item)",
        "import os\nfiles = os.listdir(path)",
        "class Circle:\n    def __init__(self, radius):",
    ),
}
"""What the routers are made from: each expert's own are positive, those of the others negative."""

HELD_OUT: Mapping[str, Sequence[str]] = {
    "pirate": (
        "Who invented the telephone?",
        "What is the tallest mountain in the world?",
        "Which animal is the fastest on land?",
        "Who was the first president of the United States?",
    ),
    "harbour": (
        "Who lights the lamp in the lighthouse of Port Ember?",
        "Where does Mira Solano buy her smoked eel?",
        "When do the boats of Port Ember leave the harbour?",
        "What does the harbour master of Port Ember do all day?",
    ),
    "french": (
        "Où se trouve la tour Eiffel ?",
        "Mon frère aime lire des livres le soir.",
        "Pourquoi les feuilles tombent-elles en automne ?",
        "Nous allons au marché acheter du pain.",
    ),
    "code": (
        "def subtract(a, b):\n    return a - b",
        "while n > 0:\n    n = n - 1",
        "import math\nprint(math.sqrt(16))",
        "class Dog:\n    def bark(self):\n        print('woof')",
    ),
}
"""What the routers have not seen."""

QUESTION = "What colour is the lighthouse of Port Ember?"


def main() -> None:
    """Runs the demo; exits with 1 if a variant's prompts reach its own expert no more often than by chance."""
    start = time.perf_counter()
    smollm.silence()
    say("1. Models: SmolLM2-135M-Instruct and four fine-tunes of it")
    models = smollm.make_models(FOLDER / "models")
    for name, lesson in MORE_LESSONS.items():
        models[name] = FOLDER / "models" / name
        if not models[name].exists():
            smollm.fine_tune(models["base"], models[name], lesson, smollm.Tuning(num_steps=16))
    out = FOLDER / "moe"
    say(f"2. A Mixtral of {len(PROMPTS)} experts, routers from the base model's hidden states: {out}")
    result = mergekit_ray.merge(recipe(models), out, options=MergeOptions(overwrite=True))
    print(f"   {result.plan.num_parameters:,} parameters in {result.seconds:.1f} s")
    for warning in result.plan.warnings:
        print(f"   warning: {warning}")
    say("3. transformers loads it, and it writes")
    print(f"   {QUESTION} {smollm.answer(out, QUESTION)}")
    say("4. Where the tokens of prompts go that the routers have not seen")
    shares = first_choices(out)
    print(table(shares))
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    astray = [name for number, name in enumerate(shares) if shares[name][number] <= 1 / len(shares)]
    if astray:
        sys.exit(f"Prompts of {', '.join(astray)} should reach their own expert more often than by chance.")


def recipe(models: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe of the Mixture of Experts."""
    experts = [
        {
            "source_model": str(models[name]),
            "positive_prompts": list(own),
            "negative_prompts": [prompt for other, theirs in PROMPTS.items() if other != name for prompt in theirs],
        }
        for name, own in PROMPTS.items()
    ]
    return {
        "base_model": str(models["base"]),
        "gate_mode": "hidden",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": experts,
    }


@torch.no_grad()
def first_choices(folder: Path) -> dict[str, list[float]]:
    """For each variant's held-out prompts, how often each expert is a token's first choice: mean over all layers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares = {}
    for name, prompts in HELD_OUT.items():
        counts = torch.zeros(len(HELD_OUT))
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt)])
            for scores in model(ids, output_router_logits=True).router_logits:
                counts += torch.bincount(scores.argmax(-1), minlength=len(HELD_OUT))
        shares[name] = (counts / counts.sum()).tolist()
    return shares


def table(shares: Mapping[str, Sequence[float]]) -> str:
    """Rows are prompts, columns experts; each row sums to 100 %."""
    width = max(map(len, shares)) + 2
    lines = ["   " + "prompts of".ljust(width + 2) + "".join(f"{name:>{width}}" for name in shares) + "   own/chance"]
    for number, (name, row) in enumerate(shares.items()):
        cells = "".join(f"{100 * share:>{width - 2}.0f} %" for share in row)
        lines.append(f"   {name:<{width + 2}}{cells}{row[number] * len(row):>12.1f}x")
    lines.append("   " + "chance".ljust(width + 2) + "".join(f"{100 / len(shares):>{width - 2}.0f} %" for _ in shares))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
