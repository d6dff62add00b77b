"""The example recipes, run: small models stand on a Hub under the names that the recipes use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

import mergekit_ray
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.planning.make import referenced_models
from mergekit_ray.storage.names import file_name, repository_of
from support.models import ModelLibrary, load, logits
from support.servers.hub_server import HubServer, serving

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yml"))

FAMILIES = {
    "moe_custom.yml": "gemma2",
    "moe_deepseek.yml": "llama",
    "moe_flex_olmo.yml": "olmo2",
    "moe_qwen2.yml": "qwen2",
    "moe_qwen3.yml": "qwen3",
}
"""Of the models of a recipe; the others merge Mistrals."""

NEEDS_CODE = {"moe_custom.yml", "moe_deepseek.yml"}
"""transformers runs what they make with code that travels with the model."""

EXPECTED = ("trust_remote_code", "can hardly tell", "prompts cancel", "are in both models")
"""Parts of warnings: of code, and of routers and rows that a tokenizer of few words makes of little."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:
        yield server


def test_there_are_examples_of_both_kinds() -> None:
    kinds = [isinstance(load_recipe(path), MoeRecipe) for path in CONFIGS]
    assert kinds.count(True) >= 8
    assert kinds.count(False) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_makes_a_model(path: Path, server: HubServer, models: ModelLibrary, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    num_layers = 32 if "layer_range" in path.read_text() else 4
    for variant, reference in enumerate(referenced_models(recipe)):
        if reference.path.endswith(".safetensors"):
            repository, file = repository_of(f"hf://{reference.path}"), file_name(reference.path)
            tensors = {"decoder.conv_in.weight": torch.full((4, 4), float(variant)), f"own.{variant}": torch.ones(3)}
            server.add(
                repository, {file: save({**tensors, "encoder.conv_in.weight": torch.full((4,), float(variant))})}
            )
            continue
        family = FAMILIES.get(path.name, "mistral")
        folder = models.get(family, variant, num_layers=num_layers, dtype=torch.bfloat16, with_tokenizer=True)
        if isinstance(recipe, MoeRecipe) and recipe.add_to_base and reference == recipe.base_model:
            experts = [{"source_model": str(folder)}] * 2
            mixture = {"base_model": str(folder), "experts": experts, "gate_mode": "random"}
            folder = Path(mergekit_ray.merge(mixture, tmp_path / "mixture").uri)
        server.add(reference.path, {file.name: file.read_bytes() for file in folder.iterdir()})
    result = mergekit_ray.merge(path, tmp_path / "out", options=MergeOptions(executor="local"))
    assert result.uri == str(tmp_path / "out")
    if path.name == "files.yml":
        found = {
            name: tensor.flatten()[0].item()
            for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        }
        assert found == pytest.approx({"decoder.conv_in.weight": 0.3, "encoder.conv_in.weight": 0.5})
        return
    assert not [warning for warning in result.plan.warnings if not any(words in warning for words in EXPECTED)]
    if path.name not in NEEDS_CODE:
        assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_and_names_its_output(path: Path) -> None:
    text = path.read_text()
    data: dict[str, Any] = yaml.safe_load(text)
    assert f"#   merge configs/{path.name}" in text.splitlines()
    assert "output" in data
