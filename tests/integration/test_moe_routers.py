"""Routers in merged files, and bytes that depend on the recipe alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.runtime.api import MergeOptions
from support.merging import run_command
from support.models import ModelLibrary, contents, tensors_of
from support.moe_cases import CASES, MIXTRAL, SHARED_GATE, Case, expert, merge
from support.ray_cluster import RayCluster


@pytest.fixture
def recipe(models: ModelLibrary) -> dict[str, Any]:
    """Noise, scaling and copies in several shards."""
    base, first, second = (models.get("llama", variant) for variant in range(3))
    listed = [expert(first, noise_scale=0.1), expert(second), expert(first, residual_scale=0.3)]
    return MIXTRAL.recipe(base, *listed, output={"max_shard_size": 50_000}, seed=5)


class TestSameBytes:
    def test_for_any_number_of_workers_and_chunk_size(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        for number, (workers, chunk) in enumerate([(1, None), (4, 1000), (3, 1 << 10)]):
            options = MergeOptions(executor="local", num_workers=workers, chunk_elements=chunk)
            mergekit_ray.merge(recipe, tmp_path / str(number), options=options)
        assert len(list((tmp_path / "0").glob("*.safetensors"))) > 3
        assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")

    @pytest.mark.ray
    def test_on_ray(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        mergekit_ray.merge(recipe, tmp_path / "local")
        with RayCluster(num_nodes=2):
            options = MergeOptions(executor="ray", num_workers=2)
            mergekit_ray.merge(recipe, tmp_path / "ray", options=options)
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")

    def test_another_seed_makes_other_routers_and_noise_and_changes_nothing_else(
        self, recipe: dict[str, Any], tmp_path: Path
    ) -> None:
        mergekit_ray.merge(recipe, tmp_path / "a")
        mergekit_ray.merge(recipe, tmp_path / "b", seed=6)
        a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
        changed = {name for name in a if not torch.equal(a[name], b[name])}
        random = {f"model.layers.{layer}.{MIXTRAL.router}" for layer in range(4)}
        noisy = {
            f"model.layers.{layer}.block_sparse_moe.experts.0.w{i}.weight" for layer in range(4) for i in (1, 2, 3)
        }
        assert changed == random | noisy


class TestRouters:
    def test_random_ones_are_normal_or_uniform(self, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get("llama")
        for mode in ("random", "uniform_random"):
            recipe = {**MIXTRAL.recipe(source, *[expert(source)] * 8), "gate_mode": mode}
            mergekit_ray.merge(recipe, tmp_path / mode)
        normal = torch.cat(MIXTRAL.routers(tmp_path / "random"))
        assert float(normal.std()) == pytest.approx(1.0, abs=5 / (2 * normal.numel()) ** 0.5)
        uniform = torch.cat(MIXTRAL.routers(tmp_path / "uniform_random"))
        bound = 32**-0.5
        assert bound * 0.98 < float(uniform.abs().max()) <= bound
        assert float(uniform.std()) == pytest.approx(bound / 3**0.5, rel=0.1)

    @pytest.mark.parametrize("case", [MIXTRAL, CASES["qwen2_moe of qwen2, shared"]], ids=lambda case: case.model_type)
    def test_from_prompts(self, case: Case, models: ModelLibrary, tmp_path: Path) -> None:
        from mergekit_ray.config import load_recipe
        from mergekit_ray.config.moe_recipe import MoeRecipe
        from mergekit_ray.runtime.api import open_models
        from mergekit_ray.runtime.routing import routers

        base, other = models.get(case.dense, 1, with_tokenizer=True), models.get(case.dense, 2)
        recipe = case.recipe(
            base,
            expert(base, positive_prompts=["the capital of France"]),
            expert(other, positive_prompts=["is Paris"], negative_prompts=["France"]),
            gate_mode="hidden",
        )
        if case.shared:
            recipe["shared_experts"][0]["positive_prompts"] = ["of"]
        merge(recipe, tmp_path / "out")
        loaded = load_recipe(recipe)
        assert isinstance(loaded, MoeRecipe)
        expected = routers(loaded, open_models(list(loaded.model_references())))
        for layer, router in enumerate(case.routers(tmp_path / "out")):
            assert torch.equal(router, torch.from_numpy(expected.vectors[layer]))
        if case.shared:
            for layer, gate in enumerate(case.routers(tmp_path / "out", name=SHARED_GATE)):
                assert torch.equal(gate, torch.from_numpy(expected.shared[layer]))

    def test_plan_and_validate_leave_the_weights_alone(self, models: ModelLibrary, tmp_path: Path) -> None:
        base = models.get("llama", 1)  # no tokenizer: prompts could not even be read
        listed = [expert(base, positive_prompts=["a"]), expert(models.get("llama", 2), positive_prompts=["b"])]
        file = tmp_path / "moe.yml"
        file.write_text(json.dumps({"base_model": str(base), "experts": listed}))
        planned = run_command("mergekit-ray", "plan", file, "--json")
        assert planned.returncode == 0, planned.stderr
        assert "routers are made from the prompts when the merge is run" in planned.stdout
        validated = run_command("mergekit-ray", "validate", "--models", file)
        assert validated.returncode == 0, validated.stderr
        assert "a Mixture-of-Experts recipe, valid, and its models fit together" in validated.stdout
