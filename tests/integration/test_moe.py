"""Mixtures of Experts of every family, loaded by transformers: all weights found, no others, and the right numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.core.errors import ModelError
from mergekit_ray.runtime.api import MergeOptions
from support import models as small_models
from support.merging import run_command
from support.models import Family, ModelLibrary, config_of, contents, load, logits, tensors_of
from support.moe_reference import assemble
from support.ray_cluster import RayCluster


@dataclass(frozen=True)
class Case:
    """A dense family made into an MoE.

    Attributes:
        dense: family of the models.
        model_type: of the result.
        router: name of its router below a layer.
        class_name: what transformers loads it as.
        architecture: as the recipe says, None to have it inferred.
        shared: with a shared expert.
    """

    dense: str
    model_type: str
    router: str
    class_name: str
    architecture: str | None = None
    shared: bool = False

    def recipe(self, base: Path, *experts: dict[str, Any], **more: Any) -> dict[str, Any]:
        named = {} if self.architecture is None else {"architecture": self.architecture}
        shared = [{"source_model": str(base), "residual_scale": 0.5}] if self.shared else None
        common = {"gate_mode": "random", "shared_experts": shared}
        return {"base_model": str(base), "experts": list(experts), **common, **named, **more}

    def routers(self, out: Path, num_layers: int = 4, name: str | None = None) -> list[torch.Tensor]:
        tensors = tensors_of(out)
        return [tensors[f"model.layers.{layer}.{name or self.router}"] for layer in range(num_layers)]


MIXTRAL = Case("llama", "mixtral", "block_sparse_moe.gate.weight", "MixtralForCausalLM")
QWEN2 = Case("qwen2", "qwen2_moe", "mlp.gate.weight", "Qwen2MoeForCausalLM")
SHARED_GATE = "mlp.shared_expert_gate.weight"

CASES = {
    "mixtral of llama": MIXTRAL,
    "mixtral of mistral": Case("mistral", "mixtral", "block_sparse_moe.gate.weight", "MixtralForCausalLM"),
    "qwen2_moe of qwen2": QWEN2,
    "qwen2_moe of qwen2, shared": Case("qwen2", "qwen2_moe", QWEN2.router, QWEN2.class_name, shared=True),
    "qwen2_moe of mistral": Case("mistral", "qwen2_moe", QWEN2.router, QWEN2.class_name, "qwen2_moe"),
    "qwen2_moe of llama, shared": Case("llama", "qwen2_moe", QWEN2.router, QWEN2.class_name, shared=True),
    "qwen3_moe of qwen3": Case("qwen3", "qwen3_moe", "mlp.gate.weight", "Qwen3MoeForCausalLM"),
    "flex_olmo of olmo2": Case("olmo2", "flex_olmo", "mlp.gate.weight", "FlexOlmoForCausalLM"),
}


@pytest.fixture(scope="module", autouse=True)
def olmo2() -> Iterator[None]:
    """A family that only these tests need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_models.FAMILIES, "olmo2", Family("Olmo2", {"rope_parameters": {"rope_theta": 5e5}}))
        yield


def expert(model: Path, **more: Any) -> dict[str, Any]:
    return {"source_model": str(model), **more}


def merge(recipe: dict[str, Any], out: Path) -> Any:
    """The merged model as transformers loads it, with as many parameters as the plan and the files say."""
    result = mergekit_ray.merge(recipe, out)
    model = load(out)
    stored = sum(tensor.numel() for tensor in tensors_of(out).values())
    assert result.plan.num_parameters == model.num_parameters() == stored
    return model


def assert_close(found: torch.Tensor, expected: torch.Tensor, roundings: float = 64.0) -> None:
    """Equal to within a few roundings of float32 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * 2.0**-24 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
class TestEveryFamily:
    def test_identical_experts_are_the_dense_model(self, name: str, models: ModelLibrary, tmp_path: Path) -> None:
        case = CASES[name]
        source = models.get(case.dense)
        recipe = case.recipe(source, *[expert(source)] * 3, experts_per_token=2)
        recipe["shared_experts"] = None
        if case.shared:
            recipe["architecture"] = case.model_type
        model = merge(recipe, tmp_path / "out")
        assert type(model).__name__ == case.class_name
        assert config_of(tmp_path / "out")["model_type"] == case.model_type
        assert_close(logits(model), logits(load(source)))

    def test_different_experts_are_the_reference(self, name: str, models: ModelLibrary, tmp_path: Path) -> None:
        case = CASES[name]
        base, *sources = (models.get(case.dense, variant) for variant in range(4))
        scales = [1.0, 0.5, -2.0]
        listed = [expert(s, residual_scale=scale) for s, scale in zip(sources, scales, strict=True)]
        model = merge(case.recipe(base, *listed, experts_per_token=2), tmp_path / "out")
        gates = case.routers(tmp_path / "out", name=SHARED_GATE) if case.shared else None
        reference = assemble(
            base,
            sources,
            case.routers(tmp_path / "out"),
            2,
            shared=base if case.shared else None,
            shared_gates=gates,
            residual_scales=scales,
            shared_scale=0.5,
        )
        expected = logits(reference)
        assert_close(logits(model), expected)
        assert float((expected - logits(load(base))).abs().max()) > 0.01  # the experts are seen to matter
        self.check_use(model, tmp_path)

    @staticmethod
    def check_use(model: Any, tmp_path: Path) -> None:
        """Saved and loaded again it is the same, and it writes text."""
        said = logits(model)
        model.save_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(load(tmp_path / "saved")), said, rtol=0, atol=0)
        written = model.generate(torch.arange(3, 9).reshape(1, -1), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.shape == (1, 9)

    def test_packed_experts_are_the_same_model(self, name: str, models: ModelLibrary, tmp_path: Path) -> None:
        case = CASES[name]
        base, *sources = (models.get(case.dense, variant) for variant in range(3))
        listed = [expert(sources[0], noise_scale=0.05), expert(sources[1], noise_scale=0.05, residual_scale=0.5)]
        both = {}
        for layout in ("separate", "packed"):
            recipe = case.recipe(base, *listed, *listed, expert_layout=layout)
            both[layout] = merge(recipe, tmp_path / layout)
        packed = tensors_of(tmp_path / "packed")
        assert packed["model.layers.3.mlp.experts.gate_up_proj"].shape == (4, 128, 32)
        assert packed["model.layers.3.mlp.experts.down_proj"].shape == (4, 32, 64)
        assert not any(".experts.0." in each for each in packed)
        torch.testing.assert_close(logits(both["packed"]), logits(both["separate"]), rtol=0, atol=0)


def test_deepseek_is_the_reference_with_its_own_names(models: ModelLibrary, tmp_path: Path) -> None:
    """transformers has no class for it: the reference's block is named as that of its code."""
    base, *sources = (models.get("llama", variant) for variant in range(4))
    case = Case("llama", "deepseek", "mlp.gate.weight", "DeepseekForCausalLM", "deepseek", shared=True)
    recipe = case.recipe(base, *map(expert, sources), experts_per_token=2)
    result = mergekit_ray.merge(recipe, tmp_path / "out")
    routers = case.routers(tmp_path / "out")
    expected = assemble(base, sources, routers, 2, shared=base, shared_scale=0.5)
    # Every weight of it found in the merged files, and no other; those that are wrong would show.
    empty = assemble(base, [base] * 3, [torch.zeros_like(router) for router in routers], 2, shared=base)
    assert empty.load_state_dict(tensors_of(tmp_path / "out"), strict=True)
    assert_close(logits(empty), logits(expected), roundings=0)
    config = config_of(tmp_path / "out")
    wanted = {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "n_routed_experts": 3,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
    }
    assert wanted.items() <= config.items()
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert any("trust_remote_code" in warning for warning in result.plan.warnings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_identical_experts_are_the_dense_model(dtype: str, models: ModelLibrary, tmp_path: Path) -> None:
    source = models.get("llama", 1)
    model = merge(MIXTRAL.recipe(source, expert(source), expert(source), dtype=dtype), tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {getattr(torch, dtype)}
    assert model.dtype == getattr(torch, dtype)
    dense = load(source).to(getattr(torch, dtype))
    expected = logits(dense)
    step = torch.finfo(getattr(torch, dtype)).eps * float(expected.abs().max())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=8 * step)


class TestConfig:
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_embeddings_stay_as_they_are(self, tied: bool, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get("llama", 1, tied=tied)
        model = merge(MIXTRAL.recipe(source, expert(source), expert(source)), tmp_path / "out")
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is not tied
        assert_close(logits(model), logits(load(source)))

    def test_settings_of_rope_in_the_old_spelling(self, models: ModelLibrary, tmp_path: Path) -> None:
        """As files on the Hub have them: no ``rope_parameters``, nothing said that is the default."""
        source = tmp_path / "old"
        shutil.copytree(models.get("llama", 1), source)
        config = config_of(source)
        for key in ("rope_parameters", "head_dim", "dtype", "num_key_value_heads", "rms_norm_eps", "hidden_act"):
            del config[key]
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
        config |= {"rope_theta": 500.0, "rope_scaling": {**scaling, "original_max_position_embeddings": 32}}
        config |= {"torch_dtype": "float32", "num_key_value_heads": 2}
        (source / "config.json").write_text(json.dumps(config))
        model = merge(MIXTRAL.recipe(source, expert(source), expert(source)), tmp_path / "out")
        written = config_of(tmp_path / "out")
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
        assert written["rope_scaling"] == config["rope_scaling"]
        assert written["rope_parameters"]["factor"] == 8.0
        assert_close(logits(model), logits(load(source)))
        plain = load(models.get("llama", 1))
        assert float((logits(plain) - logits(model)).abs().max()) > 1e-3  # the settings are seen to matter

    def test_windows_of_some_layers(self, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get("qwen2", 1)
        assert config_of(source)["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
        bare = tmp_path / "bare"  # layers' types left to the class, as older files do
        shutil.copytree(source, bare)
        config = config_of(bare)
        del config["layer_types"]
        (bare / "config.json").write_text(json.dumps(config))
        for number, base in enumerate((source, bare)):
            model = merge(QWEN2.recipe(base, expert(base), expert(base)), tmp_path / f"out{number}")
            assert config_of(tmp_path / f"out{number}")["layer_types"] == config_of(source)["layer_types"]
            assert_close(logits(model), logits(load(source)))


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


def test_what_does_not_fit_is_said_before_anything_is_written(models: ModelLibrary, tmp_path: Path) -> None:
    base, wide = models.get("llama"), models.get("llama", hidden_size=48)
    deep, foreign = models.get("llama", num_layers=2), models.get("mistral")
    recipe = MIXTRAL.recipe(base, expert(base), expert(wide), expert(deep), expert(foreign))
    with pytest.raises(ModelError) as caught:
        mergekit_ray.merge(recipe, tmp_path / "out")
    message = str(caught.value)
    for part in ("[64, 32]", "[64, 48]", f"layers: 4 in {base}, 2 in {deep}", "'llama'", "'mistral'", str(foreign)):
        assert part in message
    assert not (tmp_path / "out").exists()
