"""Routers in merged files, and bytes that depend on the recipe alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import Interrupted, MergeError, PlanError
from mergekit_ray.operations.kept_routers import ROUTERS_FILE
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.routing import layers
from mergekit_ray.routing.layers import prompt_states
from support.failures.boundaries import Boundary, Fault
from support.merging import Events, run_command
from support.models import ModelLibrary, contents, load, rewrite, tensors_of
from support.moe_cases import CASES, MIXTRAL, SHARED_GATE, Case, expert, merge
from support.servers.ray_cluster import RayCluster
from support.waiting import DEADLINE_SECONDS

LOCAL = MergeOptions(executor="local", num_workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A Ray of two nodes with one CPU each."""
    with RayCluster(num_nodes=2) as running:
        yield running


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
    def test_on_ray(self, recipe: dict[str, Any], cluster: RayCluster, tmp_path: Path) -> None:
        mergekit_ray.merge(recipe, tmp_path / "local")
        mergekit_ray.merge(recipe, tmp_path / "ray", options=MergeOptions(executor="ray", num_workers=2))
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
        from mergekit_ray.checkpoint.models import open_models
        from mergekit_ray.config.load import load_recipe
        from mergekit_ray.config.moe_recipe import MoeRecipe
        from mergekit_ray.routing.routers import routers

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
        refused = run_command("mergekit-ray", "validate", "--models", file)
        assert refused.returncode == 3
        assert "there is no tokenizer beside the model, and routers made from prompts need one" in refused.stderr
        with_tokenizer = models.get("llama", 1, with_tokenizer=True)
        file.write_text(json.dumps({"base_model": str(with_tokenizer), "experts": listed}))
        validated = run_command("mergekit-ray", "validate", "--models", file)
        assert validated.returncode == 0, validated.stderr
        assert "a Mixture-of-Experts recipe, valid, and its models fit together" in validated.stdout


NUM_PROMPTS = 300
"""More tokens than go through a layer at once: two batches."""


@pytest.fixture(scope="module")
def prompted(models: ModelLibrary) -> dict[str, Any]:
    base, other = models.get("llama", 1, with_tokenizer=True), models.get("llama", 2)
    words = ["the capital of France", "is Paris", "of the France", "is the capital"]
    many = [f"{words[i % 4]} {words[i // 4 % 4]} {words[i // 16 % 4]}" for i in range(NUM_PROMPTS)]
    return MIXTRAL.recipe(
        base,
        expert(base, positive_prompts=many[::2]),
        expert(other, positive_prompts=many[1::2], negative_prompts=["France"]),
        gate_mode="hidden_avg",
    )


class TestPromptsOnRay:
    @pytest.mark.ray
    def test_workers_compute_the_states(
        self, prompted: dict[str, Any], cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mergekit_ray.merge(prompted, tmp_path / "local")
        monkeypatch.setattr(layers, "prompt_states", None)  # not in this process
        mergekit_ray.merge(prompted, tmp_path / "ray", options=MergeOptions(executor="ray"))
        here, there = tensors_of(tmp_path / "local"), tensors_of(tmp_path / "ray")
        for name, tensor in here.items():
            # Workers may have another number of threads, and so another order of sums.
            tolerance = 1e-6 if name.endswith(MIXTRAL.router) else 0.0
            assert float((there[name] - tensor).abs().max()) <= tolerance, name

    @pytest.mark.ray
    def test_errors_arrive_as_they_were_raised(
        self, prompted: dict[str, Any], cluster: RayCluster, models: ModelLibrary, tmp_path: Path
    ) -> None:
        base = models.get("llama", 1, with_tokenizer=True)
        folder = tmp_path / "damaged"
        shutil.copytree(base, folder)
        rewrite(folder, {"model.layers.1.mlp.up_proj.weight": torch.full((64, 32), torch.nan)})
        damaged = {**prompted, "base_model": str(folder)}
        with pytest.raises(MergeError, match="entering layer 2 are not finite"):
            mergekit_ray.merge(damaged, tmp_path / "out", options=MergeOptions(executor="ray"))
        assert not (tmp_path / "out").exists()


def elsewhere(*args: Any, **options: Any) -> np.ndarray:
    """Hidden states as a processor of another kind computes them."""
    return np.roll(prompt_states(*args, **options), 1, axis=-1)


CRASHES: Mapping[str, Boundary] = {
    "made": Boundary("planned"),
    "about to be kept": Boundary("put", name=f"/{ROUTERS_FILE}"),
    "kept": Boundary("put", after=True, name=f"/{ROUTERS_FILE}"),
    "first shard committed": Boundary("commit", after=True, number=3),  # after the plan's and the routers' notes
    "second shard recorded": Boundary("put", after=True, name=".safetensors.json", number=2, done=2),
    "manifest": Boundary("put", after=True, name="mergekit-ray.json", done=2),
}


@pytest.fixture(scope="module")
def here_and_there(
    prompted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What this machine makes, and one with another processor."""
    folder, recipe = tmp_path_factory.mktemp("routed"), {**prompted, "output": {"max_shard_size": 50_000}}
    mergekit_ray.merge(recipe, folder / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "prompt_states", elsewhere)
        mergekit_ray.merge(recipe, folder / "there")
    here, there = contents(folder / "here"), contents(folder / "there")
    assert here != there
    return here, there


def merge_and_die(recipe: dict[str, Any], out: Path, name: str) -> None:
    """What a child does."""
    fault = Fault(CRASHES[name], lambda: os.kill(os.getpid(), signal.SIGKILL))
    fault.arm("local")
    mergekit_ray.merge(recipe, out, options=LOCAL, reporter=fault.reporter)


def stopped_after_one(recipe: dict[str, Any], out: Path, options: MergeOptions) -> None:
    """Merge until a shard is written."""
    stop = threading.Event()

    def stop_after_one(kind: str) -> None:
        if kind == "shard_done":
            stop.set()

    with pytest.raises(Interrupted):
        mergekit_ray.merge(recipe, out, options=options, reporter=Events(stop_after_one), stop=stop)


class TestRoutersAreMadeOnce:
    """They take the base model's layers, and their last bits depend on the processor."""

    def test_not_again_for_what_is_there(
        self, prompted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = Events(), Events()
        mergekit_ray.merge(prompted, tmp_path / "out", reporter=first)
        assert first.all[0][0] == "routing"
        monkeypatch.setattr(layers, "prompt_states", None)
        mergekit_ray.merge(prompted, tmp_path / "out", reporter=second)
        assert [kind for kind, _ in second.all] == ["warning", "planned", "already_done"]

    def test_not_for_a_place_that_is_taken(
        self, prompted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mergekit_ray.merge(MIXTRAL.recipe(Path(prompted["base_model"]), *prompted["experts"]), tmp_path / "out")
        monkeypatch.setattr(layers, "prompt_states", None)
        with pytest.raises(PlanError, match="is there"):
            mergekit_ray.merge(prompted, tmp_path / "out")

    @pytest.mark.parametrize("is_replacing", [False, True])
    def test_a_merge_goes_on_where_another_processor_left_off(
        self, is_replacing: bool, prompted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the routers of the first."""
        recipe = {**prompted, "output": {"max_shard_size": 50_000}}
        mergekit_ray.merge(recipe, tmp_path / "expected")
        options = MergeOptions(executor="local", overwrite=is_replacing)
        if is_replacing:
            mergekit_ray.merge(MIXTRAL.recipe(Path(prompted["base_model"]), *prompted["experts"]), tmp_path / "out")
        stopped_after_one(recipe, tmp_path / "out", options)
        monkeypatch.setattr(layers, "prompt_states", elsewhere)
        second = Events()
        result = mergekit_ray.merge(recipe, tmp_path / "out", options=options, reporter=second)
        assert second.of("resumed")
        assert not second.of("routing")
        assert result.num_resumed > 0
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
        load(tmp_path / "out")
        mergekit_ray.merge(recipe, tmp_path / "elsewhere")
        assert contents(tmp_path / "elsewhere") != contents(tmp_path / "expected")

    @pytest.mark.parametrize("name", CRASHES)
    def test_a_merge_that_was_killed_goes_on_elsewhere(
        self,
        name: str,
        prompted: dict[str, Any],
        here_and_there: tuple[dict[str, bytes], dict[str, bytes]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With the routers of the first run if these had been kept, and of the second if not: never with both's."""
        recipe, boundary = {**prompted, "output": {"max_shard_size": 50_000}}, CRASHES[name]
        child = multiprocessing.get_context("spawn").Process(
            target=merge_and_die, args=(recipe, tmp_path / "out", name)
        )
        child.start()
        child.join(DEADLINE_SECONDS)
        assert child.exitcode == -signal.SIGKILL
        monkeypatch.setattr(layers, "prompt_states", elsewhere)
        events = Events()
        result = mergekit_ray.merge(recipe, tmp_path / "out", options=LOCAL, reporter=events)
        assert result.num_resumed >= boundary.done
        is_kept = name not in ("made", "about to be kept")
        assert contents(tmp_path / "out") == here_and_there[not is_kept]
        assert len(events.of("routing")) == (not is_kept)

    @pytest.mark.parametrize("damage", ["cut", "lost"])
    def test_without_usable_ones_it_goes_on_too(
        self, damage: str, prompted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = {**prompted, "output": {"max_shard_size": 50_000}}
        stopped_after_one(recipe, tmp_path / "out", MergeOptions(executor="local"))
        (kept,) = (tmp_path / "out").glob(f".mergekit-ray/*/{ROUTERS_FILE}")
        if damage == "cut":
            kept.write_bytes(kept.read_bytes()[:-100])
        else:
            kept.unlink()
        monkeypatch.setattr(layers, "prompt_states", elsewhere)
        second = Events()
        assert mergekit_ray.merge(recipe, tmp_path / "out", reporter=second).num_resumed > 0
        assert len(second.of("routing")) == 1
        told = [each["message"] for each in second.of("warning") if ROUTERS_FILE in each["message"]]
        assert len(told) == (damage == "cut")
        load(tmp_path / "out")
