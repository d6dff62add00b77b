"""Parts of a model that are merged by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import loads
from support.fake_checkpoints import checkpoint, expressions_of, llama_shapes, plan_of


def sources(expression: Any) -> list[str]:
    """``model: tensor`` of everything that is read."""
    return [f"m{load.model[1:]}: {load.spec.name}" for load in loads(expression)]


def stack(text: str, *models: Any) -> dict[str, list[str]]:
    """What each output tensor is made of."""
    return {name: sources(expression) for name, expression in expressions_of(plan_of(text, *models)).items()}


MODULES = """
merge_method: linear
modules:
  model:
    models:
    - {model: /a, parameters: {weight: 1}}
    - {model: /b, parameters: {weight: 3}}
  visual:
    models: [{model: /a, parameters: {weight: 1}}]
"""


def with_tower(path: str, *, tied: bool) -> Any:
    shapes = llama_shapes(2, head=not tied) | {"visual.blocks.0.qkv.weight": (4, 4), "visual.norm.weight": (4,)}
    return checkpoint(path, shapes, {"num_hidden_layers": 2, "tie_word_embeddings": tied})


def test_modules_are_merged_each_by_itself() -> None:
    found = stack(MODULES, with_tower("/a", tied=True), with_tower("/b", tied=True))
    assert set(found) == set(with_tower("/a", tied=True).tensors)
    assert len(found["model.norm.weight"]) == 2
    assert found["visual.blocks.0.qkv.weight"] == ["m0: visual.blocks.0.qkv.weight"]
    assert found["visual.norm.weight"] == ["m0: visual.norm.weight"]


def test_the_head_belongs_to_the_module_that_makes_the_embedding() -> None:
    plan = plan_of(MODULES, with_tower("/a", tied=True), with_tower("/b", tied=False))
    assert plan.config["tie_word_embeddings"] is False
    head = expressions_of(plan)["lm_head.weight"]
    assert [x.spec.name for x in head.inputs] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert [p["weight"] for p in head.input_parameters] == [1, 3]


def test_the_head_may_be_a_module() -> None:
    text = MODULES + "  lm_head:\n    models: [{model: /b, parameters: {weight: 1}}]\n"
    found = stack(text, with_tower("/a", tied=False), with_tower("/b", tied=False))
    assert found["lm_head.weight"] == ["m1: lm_head.weight"]


def test_default_is_the_whole_model() -> None:
    text = "merge_method: passthrough\nmodules: {default: {models: [{model: /a}]}}"
    a = with_tower("/a", tied=False)
    assert stack(text, a) == {name: [f"m0: {name}"] for name in a.tensors}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modules: {audio: {models: [{model: /a}]}}", "no tensors belong to a module 'audio'"),
        ("modules: {visual: {models: [{model: /a}]}}", "no module covers 9 tensors, the first is 'model.embed_tokens"),
        (
            "modules: {default: {models: [{model: /a}]}, visual: {models: [{model: /a}]}}",
            "two modules make 'visual.*': 'default' and 'visual'",
        ),
    ],
)
def test_modules_must_cover_the_model_once(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(f"merge_method: passthrough\n{text}", with_tower("/a", tied=False))


def parts_of(names: str) -> tuple[Any, dict[str, set[str]]]:
    """A multimodal model, and the tensors of each of its parts."""
    text, head, tower, projector = names.split()
    shapes = {name.replace("model.", f"{text}.", 1): shape for name, shape in llama_shapes(2, head=False).items()}
    shapes[f"{head}weight"] = (10, 4)
    own = {
        "text_decoder": set(shapes),
        "vision_encoder": {f"{tower}.layers.0.fc.weight", f"{tower}.norm.weight"},
        "projector": {f"{projector}.0.weight", f"{projector}.1.weight"},
    }
    shapes |= dict.fromkeys(own["vision_encoder"] | own["projector"], (4, 4))
    config = {"text_config": {"num_hidden_layers": 2}, "tie_word_embeddings": False}
    return checkpoint("/a", shapes, config), own


@pytest.mark.parametrize(
    "names",
    [
        "language_model.model language_model.lm_head. vision_tower multi_modal_projector",
        "model.language_model lm_head. model.vision_tower model.multi_modal_projector",
        "model lm_head. visual merger",
        "thinker.model thinker.lm_head. thinker.visual thinker.connector",
        "language_model.model language_model.lm_head. vision_model mm_projector",
    ],
)
def test_parts_by_what_they_are_commonly_called(names: str) -> None:
    a, own = parts_of(names)
    b = checkpoint("/b", {n: spec.shape for n, (spec, _) in a.tensors.items()}, a.config)
    for module, tensors in own.items():
        listed = "".join(f"  {part}: {{models: [{{model: /{'b' if part == module else 'a'}}}]}}\n" for part in own)
        found = stack(f"merge_method: passthrough\nbase_model: /a\nmodules:\n{listed}", a, b)
        assert {name for name, made_of in found.items() if made_of == [f"m1: {name}"]} == tensors
        assert set(found) == set(a.tensors)


def test_a_text_decoder_of_a_model_without_towers_is_all_of_it() -> None:
    shapes = llama_shapes(2) | {"mtp.layers.0.fc.weight": (4, 4)}
    a = checkpoint("/a", shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    text = "merge_method: passthrough\nmodules: {text_decoder: {models: [{model: /a}]}}"
    assert set(stack(text, a)) == set(shapes)


def test_a_name_that_may_be_several_parts_is_refused() -> None:
    shapes = llama_shapes(2) | {f"{name}.layers.0.fc.weight": (4, 4) for name in ("vision_low", "vision_high")}
    a = checkpoint("/a", shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    with pytest.raises(PlanError, match="module 'vision_encoder' may be any of several parts") as caught:
        plan_of("merge_method: passthrough\nmodules: {vision_encoder: {models: [{model: /a}]}}", a)
    assert "one of: vision_high, vision_low" in str(caught.value.remedy)


def pair_of_stacks(path: str, encoder: int, decoder: int) -> Any:
    """An encoder and a decoder of their own depths, and a projector with two numbered matrices."""
    shapes = {"shared.weight": (10, 4), "encoder.proj.mlp.0.weight": (4, 4), "encoder.proj.mlp.2.weight": (4, 4)}
    for side, count in (("encoder", encoder), ("decoder", decoder)):
        shapes |= {f"{side}.layers.{i}.{fc}.weight": (4, 4) for i in range(count) for fc in ("fc1", "fc2")}
    return checkpoint(path, shapes, {"encoder_layers": encoder, "decoder_layers": decoder})


def cut(encoder: str, decoder: str) -> str:
    """A recipe with a range of layers for each side."""
    sides = (("encoder", encoder), ("decoder", decoder), ("shared", None))
    lines = [
        f"  {side}: {{models: [{{model: /a}}]}}"
        if layers is None
        else f"  {side}: {{slices: [{{sources: [{{model: /a, layer_range: {layers}}}]}}]}}"
        for side, layers in sides
    ]
    return "\n".join(["merge_method: passthrough", "modules:", *lines])


@pytest.mark.parametrize(("encoder", "decoder"), [(4, 2), (2, 4), (1, 3)])
def test_layer_ranges_count_the_modules_own_layers(encoder: int, decoder: int) -> None:
    a = pair_of_stacks("/a", encoder, decoder)
    assert set(stack(cut(f"[0, {encoder}]", f"[0, {decoder}]"), a)) == set(a.tensors)
    with pytest.raises(PlanError, match=rf"\[0, 5\] goes beyond the {encoder} layers? of encoder\.layers"):
        stack(cut("[0, 5]", f"[0, {decoder}]"), a)
    with pytest.raises(PlanError, match=rf"\[0, 5\] goes beyond the model's {decoder} layers?"):
        stack(cut(f"[0, {encoder}]", "[0, 5]"), a)


def test_a_module_without_layers_has_none_to_cut() -> None:
    text = cut("[0, 2]", "[0, 2]").replace(
        "shared: {models: [{model: /a}]}", "shared: {slices: [{sources: [{model: /a, layer_range: [0, 1]}]}]}"
    )
    with pytest.raises(PlanError, match=r"goes beyond the 0 layers of its module\n.*takes `models` in place of"):
        stack(text, pair_of_stacks("/a", 2, 2))


def test_layers_that_a_module_cuts_away_are_covered() -> None:
    a = pair_of_stacks("/a", 4, 4)
    found = stack(cut("[0, 2]", "[1, 4]"), a)
    assert [n for n in found if "encoder" in n and "fc1" in n] == [f"encoder.layers.{i}.fc1.weight" for i in range(2)]
    assert found["decoder.layers.0.fc1.weight"] == ["m0: decoder.layers.1.fc1.weight"]
    assert {"encoder.proj.mlp.0.weight", "encoder.proj.mlp.2.weight"} <= found.keys()


def test_layers_that_no_module_names_are_not_covered() -> None:
    text = "merge_method: passthrough\nmodules: {shared: {models: [{model: /a}]}, encoder: {models: [{model: /a}]}}"
    with pytest.raises(PlanError, match=r"no module covers 4 tensors, the first is 'decoder\.layers\.0\.fc1\.weight'"):
        stack(text, pair_of_stacks("/a", 2, 2))
