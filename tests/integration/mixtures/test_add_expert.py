"""More experts for a Mixture of Experts that there is already: what it has stays, routers grow."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, Interrupted, ModelError, PlanError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.output.manifest import read_manifest
from mergekit_ray.routing import growth
from support.custom_moe import code_kept_in, load_custom, reference
from support.merging import run_command, stop_at
from support.models import ModelLibrary, config_of, contents, load, logits, tensors_of
from support.references.moe import assemble

MIXTRAL_ROUTER = "block_sparse_moe.gate.weight"


def expert(model: Path, **more: Any) -> dict[str, Any]:
    return {"source_model": str(model), **more}


def mixture(base: Path, experts: list[Path], out: Path, **more: Any) -> Path:
    recipe = {"base_model": str(base), "experts": list(map(expert, experts)), "gate_mode": "random", "seed": 3, **more}
    mergekit_ray.merge(recipe, out)
    return out


def addition(base: Path, *experts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"base_model": str(base), "add_to_base": True, "experts": list(experts), "gate_mode": "random", **more}


def routers(folder: Path, name: str = MIXTRAL_ROUTER) -> list[torch.Tensor]:
    tensors = tensors_of(folder)
    return [tensors[f"model.layers.{layer}.{name}"] for layer in range(4)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * 2.0**-24 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def llamas(models: ModelLibrary) -> list[Path]:
    return [models.get("llama", variant, with_tokenizer=True) for variant in range(4)]


@pytest.fixture(scope="module")
def mixtral(llamas: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(llamas[0], llamas[1:3], tmp_path_factory.mktemp("mixtral") / "two")


class TestMixtral:
    def test_with_one_more_expert_is_the_reference(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        mergekit_ray.merge(addition(mixtral, expert(llamas[3], residual_scale=0.5)), out)
        config, before = config_of(out), config_of(mixtral)
        assert config == {**before, "num_local_experts": 3}
        old, new = tensors_of(mixtral), tensors_of(out)
        added = {name for name in new if ".experts.2." in name}
        assert new.keys() - old.keys() == added
        assert len(added) == 4 * 3
        for name in old:
            same = new[name][:2] if name.endswith(MIXTRAL_ROUTER) else new[name]
            assert torch.equal(same, old[name]), name
        assert {tuple(router.shape) for router in routers(out)} == {(3, 32)}
        model = load(out)
        expected = assemble(llamas[0], llamas[1:4], routers(out), 2, residual_scales=[1.0, 1.0, 0.5])
        assert_close(logits(model), logits(expected))
        model.save_pretrained(tmp_path / "saved")
        assert_close(logits(load(tmp_path / "saved")), logits(model))
        written = model.generate(torch.arange(3, 9).reshape(1, -1), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.shape == (1, 9)

    @pytest.mark.parametrize("mode", ["random", "uniform_random"])
    def test_random_rows_are_as_long_as_the_others_in_the_mean(
        self, mode: str, llamas: list[Path], tmp_path: Path
    ) -> None:
        """Longer rows would win every token, shorter ones none."""
        base = mixture(llamas[0], llamas[1:3], tmp_path / "base")
        scaled = tmp_path / "scaled"
        quiet = {"merge_method": "passthrough", "models": [{"model": str(base)}]}
        quiet["parameters"] = {"scale": [{"filter": "gate", "value": 0.01}, {"value": 1.0}]}
        mergekit_ray.merge(quiet, scaled)
        mergekit_ray.merge(addition(scaled, *[expert(llamas[3])] * 30, gate_mode=mode), tmp_path / "out")
        for router in routers(tmp_path / "out"):
            lengths = router.norm(dim=1)
            old, new = float(lengths[:2].mean()), float(lengths[2:].square().mean().sqrt())
            assert old < 0.1
            assert new == pytest.approx(old, rel=0.12)  # 30 rows of 32 elements: 6 standard deviations

    def test_rows_from_prompts(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        from mergekit_ray.checkpoint.models import open_models
        from mergekit_ray.config.load import load_recipe
        from mergekit_ray.config.moe_recipe import MoeRecipe
        from mergekit_ray.routing.routers import routers as from_prompts

        prompted = expert(llamas[3], positive_prompts=["the capital of France"])
        recipe = addition(mixtral, prompted, gate_mode="cheap_embed")
        result = mergekit_ray.merge(recipe, tmp_path / "out")
        loaded = load_recipe(recipe)
        assert isinstance(loaded, MoeRecipe)
        expected = from_prompts(loaded, open_models(list(loaded.model_references()))).vectors
        for layer, router in enumerate(routers(tmp_path / "out")):
            length = router[:2].norm(dim=1).mean()
            torch.testing.assert_close(router[2], torch.from_numpy(expected[layer][0]) * length)
        assert not result.plan.warnings

    def test_hidden_states_of_the_mixture_itself(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        prompts = ["the capital of France", "is Paris"]
        prompted = expert(llamas[3], positive_prompts=prompts[:1], negative_prompts=prompts[1:])
        mergekit_ray.merge(addition(mixtral, prompted, gate_mode="hidden"), tmp_path / "out")
        from transformers import AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(mixtral), load(mixtral)
        states = []
        for prompt in prompts:
            ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            with torch.inference_mode():
                states.append([state[0, -1] for state in model(ids, output_hidden_states=True).hidden_states])
        for layer, router in enumerate(routers(tmp_path / "out")):
            direction = states[0][layer] - states[1][layer]
            expected = direction / direction.norm().clamp_min(1e-30) * router[:2].norm(dim=1).mean()
            torch.testing.assert_close(router[2], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mode", ["hidden", "random"])
    def test_made_again_from_the_manifest(self, mode: str, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        prompted = expert(llamas[3], positive_prompts=["the capital of France"])
        mergekit_ray.merge(addition(mixtral, prompted, gate_mode=mode), tmp_path / "out")
        manifest = read_manifest(str(tmp_path / "out"))
        options = MergeOptions(executor="local", device="cpu")
        found = reproduce(manifest, str(tmp_path / "again"), options)
        assert found.problems == ()

    @pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random", "uniform_random"])
    def test_what_is_there_is_known_before_routers_are_read(
        self, mode: str, llamas: list[Path], mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompted = expert(llamas[3], positive_prompts=["the capital of France"])
        recipe = addition(mixtral, prompted, gate_mode=mode, output={"max_shard_size": 50_000})
        mergekit_ray.merge(recipe, tmp_path / "expected")
        stop = threading.Event()
        with pytest.raises(Interrupted):
            mergekit_ray.merge(recipe, tmp_path / "out", reporter=stop_at(stop, "shard_done"), stop=stop)
        again = mergekit_ray.merge(recipe, tmp_path / "out")
        assert again.num_resumed > 0
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
        monkeypatch.setattr(growth, "grown_routers", None)
        assert mergekit_ray.merge(recipe, tmp_path / "out").was_there

    def test_a_row_like_one_that_is_there_is_told(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        prompted = expert(llamas[3], positive_prompts=["the capital of France"])
        mergekit_ray.merge(addition(mixtral, prompted, gate_mode="cheap_embed"), tmp_path / "three")
        result = mergekit_ray.merge(addition(tmp_path / "three", prompted, gate_mode="cheap_embed"), tmp_path / "four")
        (warning,) = result.plan.warnings
        assert "experts[0]: its routers of layers 0-3 can hardly be told apart from those of expert 2" in warning

    def test_added_twice_with_one_seed_the_rows_are_others(
        self, llamas: list[Path], mixtral: Path, tmp_path: Path
    ) -> None:
        noisy = expert(llamas[3], noise_scale=0.1)
        mergekit_ray.merge(addition(mixtral, noisy), tmp_path / "three")
        mergekit_ray.merge(addition(tmp_path / "three", noisy), tmp_path / "four")
        tensors = tensors_of(tmp_path / "four")
        for layer in range(4):
            router = tensors[f"model.layers.{layer}.{MIXTRAL_ROUTER}"]
            assert not torch.equal(router[2], router[3])
            ups = [tensors[f"model.layers.{layer}.block_sparse_moe.experts.{i}.w3.weight"] for i in (2, 3)]
            assert not torch.equal(*ups)

    def test_the_same_bytes_for_any_number_of_workers(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        recipe = addition(mixtral, expert(llamas[3], noise_scale=0.1), output={"max_shard_size": 50_000})
        for workers in (1, 3):
            options = MergeOptions(executor="local", num_workers=workers)
            mergekit_ray.merge(recipe, tmp_path / str(workers), options=options)
        assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize(
    ("family", "architecture", "router", "count"),
    [
        ("qwen2", "qwen2_moe", "mlp.gate.weight", "num_experts"),
        ("qwen3", "qwen3_moe", "mlp.gate.weight", "num_experts"),
    ],
)
def test_other_families(
    family: str, architecture: str, router: str, count: str, models: ModelLibrary, tmp_path: Path
) -> None:
    base, *others = (models.get(family, variant) for variant in range(4))
    whole = mixture(base, others, tmp_path / "whole", architecture=architecture)
    part = mixture(base, others[:2], tmp_path / "part", architecture=architecture)
    mergekit_ray.merge(addition(part, expert(others[2])), tmp_path / "out")
    assert config_of(tmp_path / "out")[count] == 3
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert name.endswith(router) or torch.equal(tensor, theirs[name]), name
    expected = assemble(base, others, routers(tmp_path / "out", router), 2)
    assert_close(logits(load(tmp_path / "out")), logits(expected))


def test_packed_experts(llamas: list[Path], tmp_path: Path) -> None:
    packed = mixture(llamas[0], llamas[1:3], tmp_path / "packed", expert_layout="packed")
    separate = mixture(llamas[0], llamas[1:3], tmp_path / "separate")
    more = expert(llamas[3], noise_scale=0.05, residual_scale=0.5)
    for base in (packed, separate):
        mergekit_ray.merge(addition(base, more), base.with_name(f"{base.name}-out"))
    tensors = tensors_of(tmp_path / "packed-out")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 128, 32)
    ours, theirs = (logits(load(tmp_path / f"{name}-out")) for name in ("packed", "separate"))
    assert_close(ours, theirs)


def test_a_family_with_its_own_code(
    models: ModelLibrary, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, *others = (models.get("phi", variant) for variant in range(4))
    part = mixture(base, others[:2], tmp_path / "part")
    mergekit_ray.merge(addition(part, expert(others[2], residual_scale=0.5)), tmp_path / "out")
    found = routers(tmp_path / "out", "mlp.gate.weight")
    scales = [1.0, 1.0, 0.5]
    expected = reference(base, others, found, stack="model.layers", last="fc2", scales=scales)
    with code_kept_in(tmp_path_factory.mktemp("code")):
        assert_close(logits(load_custom(tmp_path / "out")), logits(expected))


def test_in_another_dtype_everything_is_cast(llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
    mergekit_ray.merge(addition(mixtral, expert(llamas[3]), dtype="bfloat16"), tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert config_of(tmp_path / "out").get("dtype", config_of(tmp_path / "out").get("torch_dtype")) == "bfloat16"


def test_from_the_command_line(llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.yml"
    file.write_text(json.dumps(addition(mixtral, expert(llamas[3]), experts_per_token=3)))
    planned = run_command("mergekit-ray", "plan", file)
    assert planned.returncode == 0, planned.stderr
    done = run_command("mergekit-ray", "merge", file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "out")["num_experts_per_tok"] == 3
    assert load(tmp_path / "out").config.num_experts_per_tok == 3


class TestRefusals:
    def merge(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        mergekit_ray.merge(recipe, tmp_path / "refused")

    def test_a_dense_base(self, llamas: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="its model_type is llama") as caught:
            self.merge(addition(llamas[0], expert(llamas[1])), tmp_path)
        assert "leave `add_to_base` out" in str(caught.value)

    def test_a_mixture_as_base_of_a_new_one(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="it already is a Mixture of Experts") as caught:
            self.merge({**addition(mixtral, expert(llamas[1])), "add_to_base": False}, tmp_path)
        assert "set `add_to_base: true`" in str(caught.value)

    def test_experts_of_other_shapes_and_families(
        self, llamas: list[Path], mixtral: Path, models: ModelLibrary, tmp_path: Path
    ) -> None:
        wide, deep = models.get("llama", hidden_size=48), models.get("llama", num_layers=2)
        qwen = models.get("qwen2")
        with pytest.raises(ModelError) as caught:
            self.merge(addition(mixtral, expert(wide), expert(deep), expert(qwen), expert(mixtral)), tmp_path)
        message = str(caught.value)
        for part in ("[64, 32]", "[64, 48]", "layers: 4 in", f"2 in {deep}", "is 'qwen2'", "is 'mixtral'"):
            assert part in message

    def test_more_experts_per_token_than_there_are(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="a token cannot use 4 experts of 3"):
            self.merge(addition(mixtral, expert(llamas[1]), experts_per_token=4), tmp_path)

    def test_another_architecture(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="the base model is a mixtral"):
            self.merge(addition(mixtral, expert(llamas[1]), architecture="qwen2_moe"), tmp_path)

    def test_what_would_change_the_rest(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        backbone = {"merge_method": "passthrough", "models": [{"model": str(mixtral)}]}
        changes = {"backbone": backbone, "expert_layout": "packed", "shared_experts": [expert(llamas[0])]}
        with pytest.raises(ConfigError) as caught:
            self.merge(addition(mixtral, expert(llamas[1]), **changes), tmp_path)
        assert {str(problem.path) for problem in caught.value.problems} == set(changes)

    def test_a_config_that_does_not_count_right(self, llamas: list[Path], mixtral: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(mixtral, tmp_path / "wrong")
        (tmp_path / "wrong" / "config.json").write_text(json.dumps({**config_of(mixtral), "num_local_experts": 5}))
        with pytest.raises(ModelError, match="gives 5 as the number of experts, and the routers have 2 rows"):
            self.merge(addition(tmp_path / "wrong", expert(llamas[1])), tmp_path)
