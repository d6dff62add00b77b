"""Encoders, decoders and towers that are cut by themselves: transformers loads all of it, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray.core.errors import PlanError
from support.models import config_of, tensors_of

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
PAIR = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
PAIR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN2_VL_TOWER = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
GEMMA3 = {"text_config": {**TEXT, "head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 96,
        },
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": QWEN2_VL_TOWER},
    ),
}


def made(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    class_name, config, values = MODELS[kind]
    torch.manual_seed(seed)
    getattr(transformers, class_name)(getattr(transformers, config)(**{**values, **changes})).save_pretrained(folder)
    return folder


def recipe(model: Path, **modules: list[list[int]] | None) -> dict[str, Any]:
    """Modules with their ranges of layers; None for all of them."""
    parts: dict[str, Any] = {}
    for name, ranges in modules.items():
        whole = {"models": [{"model": str(model)}]}
        cuts = [{"sources": [{"model": str(model), "layer_range": each}]} for each in ranges or ()]
        parts[name.replace("__", ".")] = whole if ranges is None else {"slices": cuts}
    return {"merge_method": "passthrough", "modules": parts}


REST = {
    "bart": {"model__shared": None, "final_logits_bias": None},
    "whisper": {},
    "t5": {"shared": None},
}
COUNTS = {
    "bart": ("encoder_layers", "decoder_layers"),
    "whisper": ("encoder_layers", "decoder_layers"),
    "t5": ("num_layers", "num_decoder_layers"),
}


def loads_whole(folder: Path, kind: str) -> None:
    loaded = getattr(transformers, MODELS[kind][0]).from_pretrained(folder, output_loading_info=True)
    report = loaded[1]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [([[0, 2], [1, 3]], None), ([[0, 2]], None), ([[0, 1], [2, 3]], [[0, 2], [1, 2]]), (None, [[0, 1]])],
)
def test_encoders_and_decoders_are_cut_each_by_itself(kind: str, encoder: Any, decoder: Any, tmp_path: Path) -> None:
    model = made(tmp_path / "model", kind)
    mergekit_ray.merge(recipe(model, encoder=encoder, decoder=decoder, **REST[kind]), tmp_path / "out")
    loads_whole(tmp_path / "out", kind)
    lengths = [
        sum(last - first for first, last in ranges or [[0, whole]]) for ranges, whole in ((encoder, 3), (decoder, 2))
    ]
    assert [config_of(tmp_path / "out")[key] for key in COUNTS[kind]] == lengths


def test_another_name_of_the_encoders_number_changes_with_it(tmp_path: Path) -> None:
    model = made(tmp_path / "model", "bart")
    config = config_of(model) | {"num_hidden_layers": 3}
    (model / "config.json").write_text(json.dumps(config))
    mergekit_ray.merge(recipe(model, encoder=[[0, 2]], decoder=None, **REST["bart"]), tmp_path / "out")
    loads_whole(tmp_path / "out", "bart")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2


@pytest.mark.parametrize(("kind", "key"), [("gemma3", "num_hidden_layers"), ("qwen2_vl", "depth")])
@pytest.mark.parametrize("ranges", [[[0, 3]], [[0, 1]], [[0, 3], [1, 3]]])
def test_towers_are_cut(kind: str, key: str, ranges: list[list[int]], tmp_path: Path) -> None:
    model = made(tmp_path / "model", kind)
    rest = {"projector": None} if kind == "gemma3" else {}
    mergekit_ray.merge(recipe(model, text_decoder=None, vision_encoder=ranges, **rest), tmp_path / "out")
    loads_whole(tmp_path / "out", kind)
    config = config_of(tmp_path / "out")
    assert config["vision_config"][key] == sum(last - first for first, last in ranges)
    assert config["text_config"]["num_hidden_layers"] == 4
    last = {
        name for name in tensors_of(model) if ("blocks.2." in name or "encoder.layers.2." in name) and "vis" in name
    }
    assert last
    assert (last <= tensors_of(tmp_path / "out").keys()) is (sum(b - a for a, b in ranges) > 2)


@pytest.mark.parametrize("ranges", [[[1, 3]], [[0, 2], [0, 2]]])
def test_the_first_block_of_an_encoder_stays_the_first(ranges: list[list[int]], tmp_path: Path) -> None:
    """T5's has the table of relative positions."""
    model = made(tmp_path / "model", "t5")
    with pytest.raises(PlanError, match="relative_attention_bias"):
        mergekit_ray.merge(recipe(model, encoder=ranges, decoder=None, shared=None), tmp_path / "out")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_number_for_both_sides_is_refused(side: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "t5", num_decoder_layers=3)
    config = config_of(model)
    del config["num_decoder_layers"]
    (model / "config.json").write_text(json.dumps(config))
    parts: dict[str, Any] = {"encoder": None, "decoder": None, "shared": None, side: [[0, 2]]}
    with pytest.raises(PlanError, match="number of layers of '" + side):
        mergekit_ray.merge(recipe(model, **parts), tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision_config.fullatt_block_indexes", [1], "fullatt_block_indexes .* tells single layers"),
        ("vision_config.num_hidden_layers", 7, "no key of its own for the number of layers"),
        ("vision_feature_layer", 2, r"vision_feature_layer \(2\) tells single layers"),
        ("vision_feature_layer", [-1, 0], "vision_feature_layer .* tells single layers"),
    ],
)
def test_what_a_config_says_of_single_layers_of_a_tower(path: str, value: Any, message: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "gemma3")
    config = config_of(model)
    outer, _, key = path.rpartition(".")
    (config[outer] if outer else config)[key] = value
    (model / "config.json").write_text(json.dumps(config))
    parts = recipe(model, text_decoder=None, vision_encoder=[[0, 2]], projector=None)
    with pytest.raises(PlanError, match=message):
        mergekit_ray.merge(parts, tmp_path / "out")


def test_layers_of_another_width_are_refused(tmp_path: Path) -> None:
    model = made(tmp_path / "model", "gemma3")
    other = made(tmp_path / "wide", "gemma3", vision_config={**VISION, "intermediate_size": 64})
    parts = recipe(model, text_decoder=None, vision_encoder=[[0, 2]], projector=None)
    cut = {"sources": [{"model": str(other), "layer_range": [2, 3]}]}
    parts["modules"]["vision_encoder"]["slices"].insert(0, cut)
    with pytest.raises(PlanError, match=r"output layer 0 of '.*' is layer 2 of its model, where 'mlp\.fc1"):
        mergekit_ray.merge(parts, tmp_path / "out")
