"""Routers from prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import MergeError, MergekitRayError, ModelError, PlanError
from mergekit_ray.routing.batches import make_batches
from mergekit_ray.routing.prompts import tokenize
from mergekit_ray.routing.routers import overlap_warnings, routers
from mergekit_ray.routing.spread import Here
from mergekit_ray.routing.tokenizer import load_tokenizer
from support.models import ModelLibrary, config_of, load, rewrite, tensors_of
from support.references.routing import NUM_LAYERS, PROMPTS, opened, recipe_of, route, unit, whole_model_states


class TestVectors:
    @pytest.mark.parametrize(("mode", "average"), [("hidden", False), ("hidden_last", False), ("hidden_avg", True)])
    def test_mean_of_positive_minus_mean_of_negative_prompts(self, mode: str, average: bool, llama: Path) -> None:
        shared = [{"source_model": "./shared", "positive_prompts": ["Paris is"], "negative_prompts": ["of France"]}]
        recipe = recipe_of(llama, PROMPTS, gate_mode=mode, shared_experts=shared)
        model = load(llama)

        def mean(prompts: Sequence[str]) -> np.ndarray:
            tokens = tokenize(opened(llama), prompts)
            return np.asarray(whole_model_states(model, tokens, average=average).mean(1))

        positive, negative = PROMPTS[0]
        first, second = mean(positive) - mean(negative), mean(PROMPTS[1][0])
        gate = mean(["Paris is"]) - mean(["of France"])
        found = route(recipe)
        assert list(found.vectors) == list(found.shared) == list(range(NUM_LAYERS))
        for layer, rows in found.vectors.items():
            assert rows.dtype == found.shared[layer].dtype == np.float32
            expected = np.stack([unit(first[layer]), unit(second[layer])])
            np.testing.assert_allclose(rows, expected, rtol=0, atol=5e-6)
            np.testing.assert_allclose(found.shared[layer], unit(gate[layer])[None], rtol=0, atol=5e-6)
        alone = route(recipe.model_copy(update={"shared_experts": None}))
        assert alone.vectors.keys() == found.vectors.keys()
        for layer, rows in alone.vectors.items():
            np.testing.assert_allclose(rows, found.vectors[layer], rtol=0, atol=5e-6)

    @pytest.mark.parametrize("family", ["llama", "gpt_neox"])
    def test_cheap_embed_adds_up_input_embeddings(self, family: str, library: ModelLibrary) -> None:
        folder = library.get(family, with_tokenizer=True)
        (name,) = (name for name in opened(folder).tensors if "embed_tokens" in name or "embed_in" in name)
        matrix = load_file(folder / "model.safetensors")[name].double().numpy()

        def total(prompts: Sequence[str]) -> np.ndarray:
            return np.asarray(sum(matrix[list(tokens)].sum(0) for tokens in tokenize(opened(folder), prompts)))

        found = route(recipe_of(folder, PROMPTS, gate_mode="cheap_embed"))
        positive, negative = PROMPTS[0]
        expected = [unit(unit(total(positive)) - unit(total(negative))), unit(total(PROMPTS[1][0]))]
        assert list(found.vectors) == list(range(NUM_LAYERS))
        for rows in found.vectors.values():
            assert rows.dtype == np.float32
            np.testing.assert_allclose(rows, np.stack(expected), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
    def test_an_empty_prompt_without_a_first_token_is_nothing(
        self, mode: str, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with_empty = recipe_of(llama, [(["", "Paris is"], [""]), (["of"], [])], gate_mode=mode)
        assert len(tokenize(opened(llama), [""])[0]) == 1
        loaded = load_tokenizer(opened(llama))
        plain = SimpleNamespace(ids=lambda text: [each for each in loaded.ids(text) if each != loaded.bos], bos=None)
        monkeypatch.setattr("mergekit_ray.routing.prompts.load_tokenizer", lambda _: plain)
        assert tokenize(opened(llama), ["", "of"])[0] == ()
        found, expected = route(with_empty), route(recipe_of(llama, [(["Paris is"], []), (["of"], [])], gate_mode=mode))
        for layer, rows in expected.vectors.items():
            np.testing.assert_allclose(found.vectors[layer], rows, rtol=0, atol=1e-6)
        with pytest.raises(ModelError, match="all prompts are empty"):
            tokenize(opened(llama), ["", ""])

    def test_a_prompt_listed_twice_counts_twice(self, llama: Path) -> None:
        twice = route(recipe_of(llama, [(["the", "the", "Paris is"], []), (["of"], [])])).vectors[2][0]
        tokens = tokenize(opened(llama), ["the", "Paris is"])
        states = whole_model_states(load(llama), tokens, average=False)[2]
        np.testing.assert_allclose(twice, unit(2 * states[0] + states[1]), rtol=0, atol=5e-6)

    def test_parts_change_nothing(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergekit_ray.routing.routers.make_batches", partial(make_batches, max_tokens=8))
        recipe = recipe_of(llama, PROMPTS)
        sizes: list[int] = []

        class Spread(Here):
            def states(self, checkpoint: Any, parts: Any, *, average: bool) -> Any:
                sizes.extend(len(part) for part in parts)
                return super().states(checkpoint, parts, average=average)

        whole = route(recipe).vectors
        spread_out = route(recipe, spread=Spread(num_parts=3)).vectors
        assert sizes == [2, 2, 1]
        for layer, rows in whole.items():
            np.testing.assert_array_equal(spread_out[layer], rows)

    def test_no_shared_expert(self, llama: Path) -> None:
        assert route(recipe_of(llama, PROMPTS)).shared == {}

    def test_a_shared_expert_without_prompts(self, llama: Path) -> None:
        recipe = recipe_of(llama, PROMPTS, shared_experts=[{"source_model": "./shared"}])
        assert route(recipe).shared == {}


class TestWarnings:
    def test_none_for_routers_that_differ(self) -> None:
        # Two unit vectors of cosine c have condition number sqrt((1+c)/(1-c)), which is 5 at c = 12/13.
        for cosine, warned in [(0.0, 0), (12 / 13 - 1e-6, 0), (12 / 13 + 1e-6, 1), (-12 / 13 - 1e-6, 1), (1.0, 1)]:
            rows = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]], np.float32)
            assert len(overlap_warnings({0: rows})) == warned, cosine

    def test_layers_and_pairs_are_named(self) -> None:
        near = np.array([[1, 0, 0], [0, 1, 0], [0.999, 0, np.sqrt(1 - 0.999**2)]], np.float32)
        apart = np.eye(3, dtype=np.float32)
        (warning,) = overlap_warnings({0: near, 1: near, 2: apart, 3: near, 4: apart})
        assert "layers 0-1, 3 " in warning
        assert "experts[0] and experts[2] apart" in warning
        assert "condition number 44.7" in warning  # sqrt(1.999 / 0.001)

    def test_experts_that_depend_on_each_other_only_together(self) -> None:
        rows = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0.01]], np.float32)
        (warning,) = overlap_warnings({7: rows})
        assert "layer 7 can hardly tell experts[1] and experts[2] apart" in warning

    def test_one_expert_and_zero_rows(self) -> None:
        assert overlap_warnings({0: np.array([[1.0, 0.0]], np.float32)}) == []
        assert overlap_warnings({0: np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)}) == []

    def test_prompts_that_end_alike(self, llama: Path) -> None:
        """All that the first layer sees of a prompt's last token is its embedding."""
        ends = [(["the capital of France"], ["Paris is France"]), (["of France"], [])]
        found = route(recipe_of(llama, ends))
        assert not found.vectors[0][0].any()
        assert np.linalg.norm(found.vectors[1][0]) == pytest.approx(1, abs=1e-6)
        assert found.warnings[0].startswith("experts[0]: its positive and negative prompts cancel in layer 0")
        found = route(recipe_of(llama, [(["the capital of France"], []), (["is Paris France"], [])]))
        np.testing.assert_array_equal(found.vectors[0][0], found.vectors[0][1])
        assert any("experts[0] and experts[1]" in warning and "layer" in warning for warning in found.warnings)


def failure(recipe: MoeRecipe) -> MergekitRayError:
    with pytest.raises(MergekitRayError) as caught:
        route(recipe)
    assert caught.value.remedy
    return caught.value


class TestErrors:
    def test_transformers_is_not_installed(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        error = failure(recipe_of(llama, PROMPTS))
        assert isinstance(error, PlanError)
        assert "pip install 'mergekit-ray[moe]'" in str(error)

    def test_random_routers(self, llama: Path) -> None:
        with pytest.raises(ValueError, match="'random' makes no router from prompts"):
            route(recipe_of(llama, PROMPTS, gate_mode="random"))

    def test_an_adapter_on_the_base_model(self, llama: Path) -> None:
        adapted = ModelReference(str(llama), lora=ModelReference("./adapter"))
        recipe = recipe_of(llama, PROMPTS).model_copy(update={"base_model": adapted})
        with pytest.raises(PlanError, match="adapter"):
            routers(recipe, {adapted: opened(llama)})

    def test_no_tokenizer(self, library: ModelLibrary) -> None:
        assert "no tokenizer beside the model" in str(failure(recipe_of(library.get(), PROMPTS)))

    def test_a_broken_tokenizer(self, llama: Path) -> None:
        (llama / "tokenizer.json").write_text("{")
        assert "cannot load the tokenizer" in str(failure(recipe_of(llama, PROMPTS)))

    @pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
    def test_a_tokenizer_of_another_model(self, mode: str, library: ModelLibrary) -> None:
        folder = library.get(vocab_size=8, with_tokenizer=True)
        error = failure(recipe_of(folder, PROMPTS, gate_mode=mode))
        assert "knows token 9, and model.embed_tokens.weight has 8 rows" in str(error)

    def test_a_prompt_that_is_too_long(self, llama: Path) -> None:
        error = failure(recipe_of(llama, [(["the " * 70], []), (["of"], [])]))
        assert "71 tokens, and the model takes 64" in str(error)

    @pytest.mark.parametrize(
        ("name", "tensor", "text"),
        [
            ("model.layers.1.mlp.up_proj.weight", None, "model.layers.1.mlp.up_proj.weight is not there"),
            ("model.norm.weight", torch.zeros(5), r"model.norm.weight has shape [5] instead of [32]"),
            ("model.norm.weight", torch.zeros(32, dtype=torch.int64), "model.norm.weight holds I64"),
            ("model.layers.1.mlp.up_proj.bias", torch.zeros(64), "leave out: model.layers.1.mlp.up_proj.bias"),
        ],
    )
    def test_weights_that_are_not_the_class_s(
        self, name: str, tensor: torch.Tensor | None, text: str, llama: Path
    ) -> None:
        rewrite(llama, {name: tensor})
        error = failure(recipe_of(llama, PROMPTS))
        assert isinstance(error, ModelError)
        assert text in str(error)

    def test_stored_constants_are_no_weights(self, llama: Path) -> None:
        before = route(recipe_of(llama, PROMPTS)).vectors
        rewrite(llama, {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
        after = route(recipe_of(llama, PROMPTS)).vectors
        np.testing.assert_array_equal(before[3], after[3])

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"model_type": "never_heard_of"}, "no class of its own for model_type 'never_heard_of'"),
            ({"num_attention_heads": 0}, "cannot make this model from its config"),
        ],
    )
    def test_configs(self, changes: dict[str, Any], text: str, llama: Path) -> None:
        (llama / "config.json").write_text(json.dumps({**config_of(llama), **changes}))
        error = failure(recipe_of(llama, PROMPTS))
        assert isinstance(error, ModelError)
        assert text in str(error)
        assert str(llama) in str(error)

    def test_codes(self, llama: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        codes, scale = tensors_of(llama)[name].to(torch.float8_e4m3fn), torch.tensor(1.0)
        rewrite(llama, {name: codes, f"{name}_scale": scale})
        error = failure(recipe_of(llama, PROMPTS))
        assert isinstance(error, ModelError)
        assert "the weights are quantized" in str(error)

    def test_what_a_config_says_of_codes_that_are_none(self, llama: Path) -> None:
        before = route(recipe_of(llama, PROMPTS)).vectors
        (llama / "config.json").write_text(
            json.dumps({**config_of(llama), "quantization_config": {"quant_method": "fp8"}})
        )
        after = route(recipe_of(llama, PROMPTS)).vectors
        for layer, vectors in before.items():
            np.testing.assert_array_equal(vectors, after[layer])

    def test_remote_code_is_not_run(self, llama: Path) -> None:
        changes = {"model_type": "their_own", "auto_map": {"AutoConfig": "modeling_other.Config"}}
        (llama / "config.json").write_text(json.dumps({**config_of(llama), **changes}))
        (llama / "modeling_other.py").write_text("raise SystemExit('remote code was run')")
        failure(recipe_of(llama, PROMPTS))

    def test_states_that_are_not_finite(self, llama: Path) -> None:
        rewrite(llama, {"model.layers.1.input_layernorm.weight": torch.full((32,), float("nan"))})
        error = failure(recipe_of(llama, PROMPTS))
        assert isinstance(error, MergeError)
        assert "entering layer 2 are not finite" in str(error)
