"""Mixtures of Experts of every family, loaded by transformers: all weights found, no others, and the right numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mergekit_ray
from support.models import ModelLibrary, config_of, load, logits, tensors_of
from support.moe_cases import CASES, MIXTRAL, QWEN2, Case, assert_close, expert, merge
from support.moe_conformance import MoeConformance
from support.references.moe import assemble


class TestEveryFamily(MoeConformance):
    CASES = CASES


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
