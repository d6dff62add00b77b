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
        ("modules: {visual: {models: [{model: /a}]}}", "no module covers 3 tensors, the first is 'model.embed_tokens"),
        (
            "modules: {default: {models: [{model: /a}]}, visual: {models: [{model: /a}]}}",
            "two modules make 'visual.*'",
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
    with pytest.raises(PlanError, match="a module 'vision_encoder' may be any of several parts") as caught:
        plan_of("merge_method: passthrough\nmodules: {vision_encoder: {models: [{model: /a}]}}", a)
    assert "one of: vision_high, vision_low" in str(caught.value.remedy)
