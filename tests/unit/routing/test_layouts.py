"""Models whose files have names of their own: their states are those of the code that comes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ray.core.errors import ModelError
from mergekit_ray.routing.batches import make_batches
from mergekit_ray.routing.layouts import as_transformers_has_it
from mergekit_ray.routing.routers import check_routable, routers
from support.custom_moe import code_kept_in, load_custom
from support.models import ModelLibrary, rewrite, tensors_of
from support.phi_msft import HEADS, WIDTH, save_phi_msft
from support.references.routing import (
    TOKENS,
    assert_same_states,
    opened,
    recipe_of,
    streamed_states,
    whole_model_states,
)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("average", [True, False])
def test_states_are_those_of_its_own_code(groups: int | None, average: bool, tmp_path: Path) -> None:
    folder = save_phi_msft(tmp_path / "phi", 1, groups=groups)
    with code_kept_in(tmp_path / "code"):
        expected = whole_model_states(load_custom(folder).float(), TOKENS, average=average)
    batches = make_batches(TOKENS, max_tokens=24)
    assert_same_states(streamed_states(opened(folder), batches, average=average), expected)


def test_queries_keys_and_values_are_runs_of_rows(tmp_path: Path) -> None:
    from mergekit_ray.routing.layers import read_tensors

    folder = save_phi_msft(tmp_path / "phi", 1, groups=2)
    seen = as_transformers_has_it(opened(folder))
    names = {part: f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    read, size = read_tensors(seen, names), WIDTH // HEADS
    assert [read[part].shape[0] for part in "qkv"] == [4 * size, 2 * size, 2 * size]
    assert torch.equal(torch.cat(list(read.values())), tensors_of(folder)["transformer.h.1.mixer.Wqkv.weight"])


def test_models_of_transformers_are_seen_as_they_are(library: ModelLibrary) -> None:
    checkpoint = opened(library.get("phi"))
    assert as_transformers_has_it(checkpoint) is checkpoint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_head": 3}, "3 heads for a width of 64"),
        ({"n_head": None}, "n_head as None, which is not a number"),
        ({"n_head_kv": 1}, r"Wqkv\.\w+ has shape .* asks for 96 rows"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        as_transformers_has_it(opened(save_phi_msft(tmp_path / "phi", 1, **config)))


class TestWhatCannotBeRouted:
    """It is reported before anything is read, without paths of our own and advice that cannot be followed."""

    PROMPTS = ((["the capital"], []), (["Paris"], []))

    def told(self, folder: Path, **config: Any) -> ModelError:
        checkpoint = opened(folder)
        checkpoint = replace(checkpoint, config={**checkpoint.config, **config})
        recipe = recipe_of(folder, self.PROMPTS, gate_mode="hidden")
        errors = []
        for attempt in (check_routable, routers):
            with pytest.raises(ModelError) as caught:
                attempt(recipe, {recipe.base_model: checkpoint})
            errors.append(str(caught.value))
            assert "mergekit-ray-" not in errors[-1]
            assert "trust_remote_code" not in errors[-1]
        assert errors[0] == errors[1]
        return caught.value

    def test_families_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        error = self.told(save_phi_msft(tmp_path / "phi", 1), model_type="phi-unheard-of")
        assert "no class of its own for model_type 'phi-unheard-of'" in error.what
        assert "cheap_embed" in str(error.remedy)

    def test_configs_that_transformers_refuses(self, llama: Path) -> None:
        error = self.told(llama, hidden_size="wide")
        assert "cannot make this model from its config" in error.what

    def test_tokenizers_that_take_code(self, llama: Path) -> None:
        (llama / "tokenizer.json").unlink()
        (llama / "vocab.json").write_text("{}")
        (llama / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}'
        )
        assert "it needs code that comes with the model, which is not run" in self.told(llama).what

    def test_tensors_that_the_class_does_not_have(self, tmp_path: Path) -> None:
        folder = save_phi_msft(tmp_path / "phi", 1)
        rewrite(folder, {"transformer.h.0.moe.gate.weight": torch.zeros(2, WIDTH)})
        error = self.told(folder)
        assert "the layers hold tensors that PhiForCausalLM would leave out: model.layers.0.moe.gate" in error.what

    def test_what_can_be_routed_passes(self, llama: Path, tmp_path: Path) -> None:
        for folder in (llama, save_phi_msft(tmp_path / "phi", 1)):
            for mode in ("hidden", "cheap_embed", "random"):
                recipe = recipe_of(folder, self.PROMPTS, gate_mode=mode)
                check_routable(recipe, {recipe.base_model: opened(folder)})
