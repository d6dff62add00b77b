"""Text models and multimodal ones, loaded by transformers after they have been merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from support.models import SMALL_TEXT, tensors_of

TOWER = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = transformers.Mistral3Config(text_config=SMALL_TEXT | {"model_type": "mistral"}, vision_config=TOWER)
    made = {
        "vlm": transformers.Mistral3ForConditionalGeneration(config),
        "txt": transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL_TEXT)),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    return made


@pytest.mark.parametrize(("base", "other"), [("vlm", "txt"), ("txt", "vlm")])
def test_what_is_merged_loads_as_the_base_does(base: str, other: str, models: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / base),
        "models": [{"model": str(tmp_path / other), "parameters": {"weight": 0.25}}],
    }
    mergekit_ray.merge(recipe, tmp_path / "out")
    merged, info = type(models[base]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = {"vlm": "model.language_model.", "txt": "model."}
    theirs = models[other].state_dict()
    for name, tensor in models[base].state_dict().items():
        if name.startswith(text[base]) or name == "lm_head.weight":
            counterpart = theirs[name.replace(text[base], text[other], 1)]
            tensor = 0.75 * tensor + 0.25 * counterpart  # noqa: PLW2901
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    towers = {name for name in tensors_of(tmp_path / "out") if "vision" in name or "projector" in name}
    assert bool(towers) == (base == "vlm")
