"""The anatomy of well-known families, by the names that their checkpoints have on the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.architectures.anatomy import Anatomy, Place, anatomy, configured_layers, is_buffer, place_of
from mergekit_ray.core.errors import CheckpointError
from support.fake_checkpoints import Shapes, llama_shapes, specs_of
from support.families import FAMILIES, H


def read(shapes: Shapes, config: dict[str, Any]) -> Anatomy:
    return anatomy(specs_of(shapes), config, "model x")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    shapes, config, expected = FAMILIES[family]
    found = read(shapes, config)
    assert {key: getattr(found, key) for key in expected} == expected
    below = {
        f"{prefix}.{i}.{rest}"
        for prefix, layers in found.layers.items()
        for i, rests in enumerate(layers)
        for rest in rests
    }
    outside = [*found.before, *found.after]
    assert below | set(outside) == set(shapes), "every tensor has one place"
    assert len(below) + len(outside) == len(shapes)


@pytest.mark.parametrize(
    ("tower", "language"),
    [
        ("vision_tower.encoder.layers", "language_model.model.layers"),
        ("model.visual.blocks", "model.language_model.layers"),
        ("audio_tower.layers", "language_model.model.layers"),
        ("vision_model.encoder.layers", "text_model.encoder.layers"),
    ],
)
def test_a_tower_as_deep_as_the_language_model_and_wider_is_not_the_main_stack(tower: str, language: str) -> None:
    shapes = {f"{stack}.{i}.weight": (size, size) for stack, size in ((tower, 64), (language, 8)) for i in range(4)}
    assert read(shapes, {"text_config": {"num_hidden_layers": 4}}).main == language


def test_a_tower_by_itself_is_the_main_stack() -> None:
    shapes = {f"vit.encoder.layer.{i}.weight": (8, 8) for i in range(4)}
    assert read(shapes, {"num_hidden_layers": 4}).main == "vit.encoder.layer"


def test_layers_that_are_missing_are_named() -> None:
    shapes = {name: shape for name, shape in llama_shapes(10).items() if not any(f".{i}." in name for i in (3, 7, 8))}
    with pytest.raises(CheckpointError) as caught:
        read(shapes, {"num_hidden_layers": 10})
    assert caught.value.what == "layers 3, 7-8 of 'model.layers' have no tensors; config.json says 10 layers"
    assert caught.value.where == "model x"


@pytest.mark.parametrize("count", [10**12, 10**400])
def test_more_layers_than_any_file_holds_are_refused(count: int) -> None:
    with pytest.raises(CheckpointError, match=rf"layers 2-{count - 1} of 'model\.layers' have no tensors"):
        read(llama_shapes(2), {"num_hidden_layers": count})


def test_layers_that_share_weights_are_stored_once() -> None:
    """As ALBERT's."""
    shapes = {name: shape for name, shape in llama_shapes(1).items() if not name.startswith("lm_head")}
    found = read(shapes, {"num_hidden_layers": 12, "num_hidden_groups": 1})
    assert found.num_layers == 1


def test_a_negative_number_of_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="says -1 layers"):
        read(llama_shapes(2), {"num_hidden_layers": -1})


def test_a_number_far_beyond_all_others_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layers 1-999999998 of 'proj' have no tensors, and layer 999999999 has"):
        read({"proj.0.weight": (H, H), "proj.999999999.weight": (H, H)}, {})


def test_of_many_gaps_some_are_named() -> None:
    shapes = {f"model.layers.{i}.w": (H, H) for i in range(0, 100, 2)}
    with pytest.raises(CheckpointError, match="layers 1, 3, 5, 7, 9, 11, 13, 15 and 42 more of"):
        read(shapes, {"num_hidden_layers": 100})


def test_a_checkpoint_cut_short_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layers 2-4 of 'model\.layers' have no tensors"):
        read(llama_shapes(2), {"num_hidden_layers": 5})


def test_gaps_in_other_stacks_are_nobodys_fault() -> None:
    found = read({**llama_shapes(2), "proj.0.weight": (H, H), "proj.2.weight": (H, H)}, {"num_hidden_layers": 2})
    assert found.stacks == {"model.layers": 2, "proj": 3}
    assert found.layers["proj"] == (("weight",), (), ("weight",))


def test_gaps_are_allowed_where_the_config_counts_nothing() -> None:
    assert read({"net.0.weight": (H, H), "net.2.weight": (H, H)}, {}).num_layers == 3


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.experts.3.w1.weight", Place("model.layers", 12, "mlp.experts.3.w1.weight")),
        ("h.0.attn.bias", Place("h", 0, "attn.bias")),
        ("h.07.attn.bias", None),
        ("h.²٣.attn.bias", None),
        (f"h.{'9' * 5000}.attn.bias", None),
        ("model.norm.weight", None),
        ("list.3", None),
        ("0.weight", None),
        ("0.model.layer.5.weight", Place("0.model.layer", 5, "weight")),
    ],
)
def test_place_of(name: str, place: Place | None) -> None:
    assert place_of(name) == place
    if place is not None:
        assert place.name == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.bias",
        "h.0.attn.bias",
        "transformer.rotary_pos_emb.inv_freq",
        "bert.embeddings.position_ids",
    ],
)
def test_buffers(name: str) -> None:
    assert is_buffer(name)


@pytest.mark.parametrize(
    "name",
    ["h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias", "h.0.self_attention.dense.bias", "lm_head.bias"],
)
def test_weights_are_no_buffers(name: str) -> None:
    assert not is_buffer(name)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_hidden_layers": 4}, 4),
        ({"n_layer": 4}, 4),
        ({"num_layers": 4}, 4),
        ({"n_layers": 4}, 4),
        ({"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 9}}, 4),
        ({"llm_config": {"num_hidden_layers": 4}}, 4),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 4}}}, 4),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": "4"}, None),
        ({}, None),
    ],
)
def test_configured_layers(config: dict[str, Any], count: int | None) -> None:
    assert configured_layers(config) == count


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("bigbird_pegasus", False)])
def test_a_stored_head_of_a_config_that_says_tied(model_type: str, tied: bool) -> None:
    """It is a copy that the class ignores, but for a class that does not heed the config."""
    found = read(llama_shapes(2), {"num_hidden_layers": 2, "model_type": model_type, "tie_word_embeddings": True})
    assert found.tied is tied
    assert found.head == (None if tied else "lm_head.weight")
    assert found.redundant == ({"lm_head.weight"} if tied else set())


def test_a_convolution_of_another_tower_is_no_head() -> None:
    shapes = {
        **llama_shapes(2),
        "vq.mid.attn.proj_out.weight": (*llama_shapes(2)["model.embed_tokens.weight"][:1], 4, 1, 1),
    }
    del shapes["lm_head.weight"]
    found = read(shapes, {"num_hidden_layers": 2, "tie_word_embeddings": True})
    assert (found.head, found.redundant) == (None, set())
