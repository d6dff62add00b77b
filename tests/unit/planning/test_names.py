"""Tensors that classes of models wrap in names of their own."""

from __future__ import annotations

import pytest

from mergekit_ray.planning.matching.names import Names, bare

LAYER = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"{prefix}{LAYER}", LAYER) for prefix in ("", "model.", "language_model.model.", "model.language_model.")),
        *((f"{prefix}{LAYER}", LAYER) for prefix in ("language_model.", "model.text_model.", "thinker.model.")),
        ("bert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"),
        ("transformer.wte.weight", "wte.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.transformer.layers.0.fc.weight", "vision_tower.layers.0.fc.weight"),
        ("talker.model.layers.0.fc.weight", "talker.layers.0.fc.weight"),
        ("text_model.encoder.layers.0.fc.weight", "encoder.layers.0.fc.weight"),
        ("vision_model.encoder.layers.0.fc.weight", "vision_model.encoder.layers.0.fc.weight"),
        ("layers.0.model.weight", "layers.0.model.weight"),
        ("model.weight", "model.weight"),
        ("model", "model"),
        ("", ""),
    ],
)
def test_bare_names(name: str, expected: str) -> None:
    assert bare(name) == expected


def test_names_are_found_under_other_wrappers() -> None:
    names = Names([f"language_model.model.{LAYER}", "vision_tower.layers.0.fc.weight", "language_model.lm_head.weight"])
    assert names.find(f"model.language_model.{LAYER}") == [f"language_model.model.{LAYER}"]
    assert names.find(f"model.{LAYER}") == [f"language_model.model.{LAYER}"]
    assert names.find("model.vision_tower.layers.0.fc.weight") == ["vision_tower.layers.0.fc.weight"]
    assert names.find("lm_head.weight") == ["language_model.lm_head.weight"]
    assert names.find("layers.1.self_attn.q_proj.weight") == []


def test_the_same_name_comes_before_all_others() -> None:
    names = Names([LAYER, f"model.{LAYER}", f"language_model.model.{LAYER}"])
    assert names.find(f"model.{LAYER}") == [f"model.{LAYER}"]
    assert len(names.find(f"transformer.{LAYER}")) == 3


def test_a_part_of_a_layer_may_have_another_name_in_files() -> None:
    names = Names(["model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"])
    assert names.find("model.layers.0.mlp.gate.weight") == ["model.layers.0.block_sparse_moe.gate.weight"]
    assert names.find("model.layers.1.mlp.gate.weight") == ["model.layers.1.mlp.gate.weight"]
    assert names.find("model.layers.2.mlp.gate.weight") == []


def test_an_unknown_wrapper_may_be_the_first_component() -> None:
    assert Names(["mine.a.b.weight"]).find("a.b.weight") == ["mine.a.b.weight"]
    assert Names(["a.b.weight"]).find("mine.a.b.weight") == ["a.b.weight"]
    assert Names(["x.a.b.weight", "y.a.b.weight"]).find("a.b.weight") == ["x.a.b.weight", "y.a.b.weight"]
