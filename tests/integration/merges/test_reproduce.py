"""Merges done again from their manifests, with inputs that have moved on since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.output.manifest import read_manifest
from support.adapters import llama, make_adapter, quiet
from support.memory_inputs import random_llama, write_model
from support.models import contents
from support.servers.hub_server import HubServer, serving

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
LOCAL = MergeOptions(executor="local")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def assert_reproduced(out: Path, target: Path) -> None:
    found = reproduce(read_manifest(str(out)), str(target), LOCAL)
    assert (found.problems, found.notes) == ((), ())
    assert weights(target) == weights(out)


def test_a_repository_that_moved_on_is_read_at_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:

        def commit(number: int, seed: int) -> None:
            folder = write_model(tmp_path / f"{number}-{seed}", random_llama(seed), CONFIG)
            server.add(f"org/model-{number}", {path.name: path.read_bytes() for path in folder.iterdir()})

        for number in range(2):
            commit(number, number)
        recipe: dict[str, Any] = {
            "merge_method": "dare_ties",  # its masks depend on the names of the models
            "base_model": "org/model-0",
            "models": [{"model": "org/model-1@main", "parameters": {"weight": 1, "density": 0.5}}],
            "seed": 3,
        }
        mergekit_ray.merge(recipe, tmp_path / "out", options=LOCAL)
        for number in range(2):
            commit(number, 10 + number)
        assert_reproduced(tmp_path / "out", tmp_path / "again")
        mergekit_ray.merge(recipe, tmp_path / "now", options=LOCAL)
        assert weights(tmp_path / "now") != weights(tmp_path / "out")


def test_adapters_are_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with quiet():
        llama().save_pretrained(tmp_path / "base")
        for number in range(2):
            make_adapter(llama(), tmp_path / f"adapter-{number}", number, target_modules="all-linear")
        listed = [
            {"model": f"./base+./adapter-{number}", "parameters": {"weight": 0.5, "density": 0.5}}
            for number in range(2)
        ]
        recipe = {"merge_method": "dare_linear", "base_model": "./base", "models": listed}
        mergekit_ray.merge(recipe, tmp_path / "out", options=LOCAL)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert_reproduced(tmp_path / "out", tmp_path / "again")
