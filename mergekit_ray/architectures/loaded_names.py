"""What transformers calls the parts of a loaded model, where its files call them otherwise.

Files of multimodal models keep the names of the classes that first wrote them; transformers 5 (and 4 since 4.52)
renames them on loading, and saves them under the old names again. An adapter speaks of the loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADS = tuple((f"{head}.", f"{head}.") for head in ("lm_head", "score", "classifier"))
_AROUND = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("model.language_model.model.", "model.language_model."),
    ("model.", "model."),
    *_HEADS,
    ("", "model."),
)
"""A whole causal model beside a tower and a projector."""

_INSIDE = (
    *((f"model.{part}.", f"model.{part}.") for part in ("visual", "audio_tower", "language_model")),
    ("model.", "model.language_model."),
    *_HEADS,
    ("", "model."),
)
"""The language model's layers at the top, and a tower beside them."""

_EMU3 = (("text_model.lm_head.", "lm_head."), ("text_model.model.", "model.text_model."), *_AROUND[3:])

_RULES: Mapping[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava"), _AROUND),
    **dict.fromkeys(("aria", "aya_vision", "fuyu", "gemma3", "got_ocr2", "internvl", "mistral3", "mllama"), _AROUND),
    **dict.fromkeys(("paligemma", "pp_chart2table", "granite_speech", "granite_speech_plus", "glmasr"), _AROUND),
    **dict.fromkeys(("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "musicflamingo"), _AROUND),
    "vibevoice_asr": _AROUND,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _INSIDE),
    "qwen2_5_omni": tuple((f"thinker.{old}", f"thinker.{new}") for old, new in _INSIDE),
    "emu3": _EMU3,
    "nemotron_h": (("backbone.", "model."),),
}
"""By the model's type: the beginning of a name in a file, and of the loaded model's; the first that fits counts."""

_PACKING = frozenset(
    {
        *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
        *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "solar_open"),
        *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
    }
)
"""Types of models whose experts transformers 5 packs into one parameter each for all that ends in `_PACKED`."""

_PACKED = ("gate_proj", "up_proj", "down_proj")


def is_taken_for_expert(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT takes a module for a routed expert's by its last component, though it is none.

    As of PEFT 0.21 (``_convert_peft_config_moe``), such names in ``target_modules`` become parameters of the experts.
    """
    is_packed = module.rpartition(".")[2] in _PACKED and str(config.get("model_type")) in _PACKING
    return is_packed and ".experts." not in module


def loaded_name(config: Mapping[str, Any], name: str) -> str:
    """The loaded model's name of a tensor or module; the same, where transformers does not rename it.

    Args:
        config: the model's ``config.json``.
        name: as in its files.
    """
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    if architecture.endswith("Model"):
        return name  # without a head there is one wrapper less
    for old, new in _RULES.get(str(config.get("model_type")), ()):
        if f"{name}.".startswith(old):
            return f"{new}{f'{name}.'.removeprefix(old)}"[:-1]
    return name
