"""What transformers calls tensors of its classes once they are loaded."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mergekit_ray.architectures.loaded_names import loaded_name
from support.sweep.building import families
from support.sweep.small_configs import small_config

RENAMED = (
    *("aria", "aya_vision", "emu3", "fuyu", "gemma3", "glmasr", "got_ocr2", "granite_speech", "granite_speech_plus"),
    *("internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "mllama", "nemotron_h"),
    *("paligemma", "pp_chart2table", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio", "qwen2_vl"),
    *("qwen3_omni_moe_thinker", "vibevoice_asr", "video_llava", "vipllava", "voxtral", "voxtral_realtime"),
)


@pytest.mark.parametrize("family", [*RENAMED, "llama", "qwen3_vl"])
def test_names_are_those_of_the_class(family: str) -> None:
    config = small_config(family)
    with torch.device("meta"):
        model = getattr(transformers, families()[family])(config)
    stated = {"model_type": config.model_type, "architectures": [type(model).__name__]}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.dim() != 2 or not name.endswith(("_proj.weight", "lm_head.weight")):
            continue
        (stored,) = revert_weight_conversion(model, {name: tensor})
        assert loaded_name(stated, stored) == name
        assert loaded_name(stated, name) == name
        assert loaded_name(stated, stored.removesuffix(".weight")) == name.removesuffix(".weight")
        seen.add(stored == name)
    assert (False in seen) == (family in RENAMED)


def test_a_class_without_a_head_has_one_wrapper_less() -> None:
    config = {"model_type": "llava", "architectures": ["LlavaModel"]}
    assert loaded_name(config, "language_model.layers.0.q_proj.weight") == "language_model.layers.0.q_proj.weight"
