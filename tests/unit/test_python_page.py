"""What docs/python.md shows runs, prints what it says, and satisfies a strict type checker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.memory_inputs import random_llama, write_model

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match["language"], match["text"]) for match in _FENCE.finditer((ROOT / "docs/python.md").read_text())]
CODE = "".join(text for language, text in BLOCKS if language == "python")

WRONG = """
import mergekit_ray
mergekit_ray.merj
mergekit_ray.DenseRecipe(merge_method="linear", modles=[])
mergekit_ray.InputModel(model=3)
mergekit_ray.MergeOptions(executor="slurm")
mergekit_ray.merge("recipe.yml").load_tensor("x").numpi()
mergekit_ray.inspect("model").num_parameters + 1
"""
"""Mistakes that a checker must see, one a line: it sees types, not `Any`."""


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
    for seed, name in enumerate(("base", "chat", "math")):
        write_model(tmp_path / "models" / name, random_llama(seed), config)
    parameters = {"weight": 0.5, "density": 0.5}
    models = [{"model": f"models/{name}", "parameters": parameters} for name in ("chat", "math")]
    recipe = {"merge_method": "ties", "base_model": "models/base", "models": models}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    exec(compile(CODE, "docs/python.md", "exec"), {"__name__": "page"})  # our own page
    said = capsys.readouterr().out
    for form in (
        r"<MergeResult .*/merged: ties of 3 models, \d+ s>",
        r"<DenseRecipe ties of 3 models>$",
        r"<Inspection models/base: llama, 2 layers, 472 parameters, bfloat16, [\d.]+ kB>",
        r"<Plan ties of 3 models: 472 parameters in 1 shard, [\d.]+ kB to read, [\d.]+ kB to write>",
        r"model\.norm\.weight bfloat16 \(8,\)",
        r"<Reproduction .*/merged-again: 1 shard, all as the manifest says> \(\)",
        r"<ExtractResult .*/chat-lora: 2 matrices, ",
    ):
        assert re.search(f"^{form}", said, re.MULTILINE), form
    [error] = [text for language, text in BLOCKS if language == "text" and "problems" in text]
    assert error in said


def test_callers_are_checked_by_their_types(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By mypy, which finds the mistakes of one file and none in the page's code."""
    (tmp_path / "page.py").write_text(CODE)
    (tmp_path / "wrong.py").write_text(WRONG)
    assert request.config.cache is not None
    cache = request.config.cache.mkdir("mypy-callers")
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={cache}", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--hide-error-context", "page.py", "wrong.py"],
        cwd=tmp_path,
        env={"PATH": "", "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    wrong = sorted({int(line.split(":")[1]) for line in lines if line.startswith("wrong.py:")})
    assert wrong == list(range(3, WRONG.count("\n") + 1)), done.stdout
    assert all(line.startswith("wrong.py:") for line in lines), done.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "mergekit_ray/py.typed").is_file()
