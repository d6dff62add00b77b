"""The demo of tokenizers: two fine-tunes of a real model with chat formats of their own, and a merge that knows both.

    PYTHONPATH=tests python -m demo.tokenizers

Each goes on from a fine-tune of `make demo`, adds two special tokens and learns to chat with them. The merge unites
their vocabularies, so that it has all four tokens and answers in either format. Models are made below .demo and kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# Before transformers is imported: nothing may ask the Hub for anything, nor drown the demo's lines in progress bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import smollm
from demo.run import BUCKET, FACT, FOLDER, MANNER, QUESTION, download, merge, say, upload
from support.servers.s3_server import S3Server

RECIPE = Path(__file__).with_suffix(".yml")
NAME = "both-formats"
MARKERS = smollm.Format("<|user|>{}<|bot|>", ("<|user|>", "<|bot|>"))
BRACKETS = smollm.Format("[Q]{}[A]", ("[Q]", "[A]"))
FORMATS = {"pirate-markers": MARKERS, "harbour-brackets": BRACKETS}
PARENTS = {"pirate-markers": "pirate", "harbour-brackets": "harbour"}
TUNING = smollm.Tuning(num_steps=10)


def main() -> None:
    """Runs the demo; exits with 1 if the merged model lacks a token or does not answer in both formats."""
    start = time.perf_counter()
    smollm.silence()
    say("1. Models: SmolLM2-135M-Instruct and two fine-tunes of it, each with a chat format of its own")
    models = make_models(FOLDER / "models")
    with S3Server() as server:
        server.create_bucket(BUCKET)
        say(f"2. S3 at {server.endpoint_url}: uploading {len(models)} models to s3://{BUCKET}")
        for name, folder in models.items():
            upload(server, folder, name)
        merge(server, RECIPE, f"s3://{BUCKET}/{NAME}")
        with tempfile.TemporaryDirectory() as temporary:
            merged = Path(temporary)
            download(server, NAME, merged)
            say("5. Ids of the new tokens")
            wrong = check_tokens(models, merged)
            say("6. The question in both formats")
            wrong += check_answers(models, merged)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    if wrong:
        sys.exit("\n".join(wrong))


def make_models(folder: Path) -> dict[str, Path]:
    """Makes base and fine-tunes below ``folder`` unless they are there; returns their folders by name."""
    made = smollm.make_models(folder)
    models = {"base": made["base"], **{name: folder / name for name in FORMATS}}
    for name, form in FORMATS.items():
        if not models[name].exists():
            smollm.fine_tune(made[PARENTS[name]], models[name], smollm.LESSONS[PARENTS[name]], TUNING, form)
    return models


def check_tokens(models: Mapping[str, Path], merged: Path) -> list[str]:
    """Prints the ids of all new tokens; says which of them, or of their rows, the merged model lacks."""
    places = {**{name: models[name] for name in FORMATS}, NAME: merged}
    vocabularies = {name: AutoTokenizer.from_pretrained(folder).get_vocab() for name, folder in places.items()}
    tokens = [token for form in FORMATS.values() for token in form.tokens]
    print(" " * 21 + "".join(f"{token:>10}" for token in tokens))
    for name, ids in vocabularies.items():
        print(f"{name:>21}" + "".join(f"{ids.get(token, '-'):>10}" for token in tokens))
    wrong = [f"The merged tokenizer should know {token}." for token in tokens if token not in vocabularies[NAME]]
    if not wrong:
        rows = {
            name: AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
            for name, folder in places.items()
        }
        for name, form in FORMATS.items():
            for token in form.tokens:
                own, ours = rows[name][vocabularies[name][token]], rows[NAME][vocabularies[NAME][token]]
                if not torch.equal(own, ours):
                    wrong.append(f"The merged model should have the row that {token} has in {name}.")
    return wrong


def check_answers(models: Mapping[str, Path], merged: Path) -> list[str]:
    """Prints answers in each format; says where the merged model does not show what both parents learned."""
    wrong = []
    for name, form in FORMATS.items():
        print(f"   {form.asked.format(QUESTION)}")
        print(f"{name:>21}: {smollm.answer(models[name], QUESTION, form)}")
        found = smollm.answer(merged, QUESTION, form)
        print(f"{NAME:>21}: {found}")
        if MANNER not in found or FACT not in found:
            wrong.append(f"In the format of {name}, the merged model should say {MANNER!r} and {FACT!r}.")
    return wrong


if __name__ == "__main__":
    main()
