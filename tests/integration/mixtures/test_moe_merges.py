"""Dense merges within a Mixture of Experts and of several: backbones, adapters, routers and experts together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergekit_ray
from support.models import ModelLibrary, config_of, logits, tensors_of
from support.moe_cases import MIXTRAL, assert_close, expert, merge
from support.references.moe import assemble


class TestBackbone:
    def test_is_what_the_dense_recipe_makes(self, models: ModelLibrary, tmp_path: Path) -> None:
        a, b, c = (models.get("llama", variant, tied=variant == 0) for variant in range(3))
        backbone = {
            "merge_method": "linear",
            "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in [(a, 1.0), (b, 3.0)]],
        }
        recipe = MIXTRAL.recipe(a, expert(b), expert(c), backbone=backbone)
        model = merge(recipe, tmp_path / "moe")
        mergekit_ray.merge(backbone, tmp_path / "dense")
        ours, dense = tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "dense")
        frame = {name for name in ours if "block_sparse_moe" not in name}
        assert frame == {name for name in dense if ".mlp." not in name}
        assert all(torch.equal(ours[name], dense[name]) for name in frame)
        assert config_of(tmp_path / "moe")["tie_word_embeddings"] is False  # one of them is not
        reference = assemble(tmp_path / "dense", [b, c], MIXTRAL.routers(tmp_path / "moe"), 2)
        assert_close(logits(model), logits(reference))

    def test_common_rows_of_different_vocabularies(self, models: ModelLibrary, tmp_path: Path) -> None:
        large, small = models.get("llama", 1), models.get("llama", 2, vocab_size=120)
        backbone = {
            "merge_method": "linear",
            "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in (large, small)],
        }
        recipe = MIXTRAL.recipe(large, expert(large), expert(small), backbone=backbone)
        merge(recipe, tmp_path / "out")
        assert config_of(tmp_path / "out")["vocab_size"] == 120


def test_an_expert_may_be_a_model_with_an_adapter(models: ModelLibrary, tmp_path: Path) -> None:
    source, adapter = models.get("llama", 1), tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(2, 32), torch.randn(64, 2)
    prefix = "base_model.model.model.layers.2.mlp.up_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    listed = [expert(source), {"source_model": f"{source}+{adapter}"}]
    merge(MIXTRAL.recipe(source, *listed), tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(source)
    for layer in range(4):
        up = theirs[f"model.layers.{layer}.mlp.up_proj.weight"]
        expected = up.double() + 2.0 * b.double() @ a.double() if layer == 2 else up.double()
        found = ours[f"model.layers.{layer}.block_sparse_moe.experts.1.w3.weight"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[f"model.layers.{layer}.block_sparse_moe.experts.0.w3.weight"], up)


@pytest.fixture(scope="module")
def mixtures(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two Mixtrals that differ in their routers and one expert."""
    folder = tmp_path_factory.mktemp("mixtures")
    base, first, second = (models.get("llama", variant) for variant in range(3))
    for seed in range(2):
        made = MIXTRAL.recipe(base, expert(first), expert(second, noise_scale=0.1), seed=seed)
        mergekit_ray.merge(made, folder / str(seed))
    return [folder / "0", folder / "1"]


class TestMergesOfMixtures:
    def test_linear_with_routers(self, mixtures: list[Path], tmp_path: Path) -> None:
        listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(mixtures, (1.0, 3.0), strict=True)]
        model = merge({"merge_method": "linear", "models": listed}, tmp_path / "out")
        ours, first, second = (tensors_of(folder) for folder in (tmp_path / "out", *mixtures))
        assert ours.keys() == first.keys()
        for name, tensor in ours.items():
            expected = (first[name].double() + 3 * second[name].double()) / 4
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours[f"model.layers.0.{MIXTRAL.router}"], first[f"model.layers.0.{MIXTRAL.router}"])
        assert torch.isfinite(logits(model)).all()
        assert config_of(tmp_path / "out") == config_of(mixtures[0])

    def test_filters_that_touch_routed_experts_only(self, mixtures: list[Path], tmp_path: Path) -> None:
        weight = [{"filter": "block_sparse_moe.experts", "value": 0.0}, {"value": 1.0}]
        listed = [
            {"model": str(mixtures[0]), "parameters": {"weight": 1.0}},
            {"model": str(mixtures[1]), "parameters": {"weight": weight}},
        ]
        merge({"merge_method": "linear", "models": listed, "parameters": {"normalize": True}}, tmp_path / "out")
        ours, first, second = (tensors_of(folder) for folder in (tmp_path / "out", *mixtures))
        for name, tensor in ours.items():
            share = 1.0 if "block_sparse_moe.experts" in name else 0.5
            expected = share * first[name].double() + (1 - share) * second[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
