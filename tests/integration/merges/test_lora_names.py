"""Adapters of models for several modalities, whose files name tensors otherwise than their classes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import mergekit_ray
from support.adapters import make_adapter, passthrough, quiet
from support.models import SMALL_TEXT, tensors_of

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def qwen() -> Any:
    """Stored as ``model.layers``, with its tower outside."""
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=SMALL_TEXT, vision_config=tower)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava() -> Any:
    """Stored as ``language_model.model.layers``."""
    config = transformers.LlavaConfig(
        text_config=SMALL_TEXT | {"model_type": "llama"}, vision_config=TOWER | {"model_type": "clip_vision_model"}
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma() -> Any:
    """Stored as ``language_model.model.layers``, tied."""
    text = SMALL_TEXT | {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
HEAD_TOO: dict[str, Any] = {"target_modules": r".*language_model.*(up|o)_proj", "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("make", "settings"), [(qwen, ATTENTION), (llava, HEAD_TOO), (gemma, ATTENTION), (gemma, HEAD_TOO)]
)
def test_what_peft_merges(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    reread = type(model).from_pretrained(tmp_path / "base")
    with quiet():
        adapter = make_adapter(reread, tmp_path / "adapter", **settings)
        fresh = type(model).from_pretrained(tmp_path / "base")
        PeftModel.from_pretrained(fresh, adapter).merge_and_unload().save_pretrained(tmp_path / "theirs")
    mergekit_ray.merge(passthrough(f"{tmp_path / 'base'}+{adapter}"), tmp_path / "out")
    base, ours = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert any(not torch.equal(tensor, base[name]) for name, tensor in ours.items() if name in base)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = type(model).from_pretrained(tmp_path / "theirs").state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
