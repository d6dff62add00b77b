"""Text models and the language models inside of multimodal ones, merged by what their parts are called."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Load, Merge
from support.fake_checkpoints import checkpoint, expressions_of, llama, llama_shapes, plan_of, sources

TASK = "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- {{model: {other}, parameters: {{weight: 0.5}}}}\n"
TOWER = {
    "vision_tower.layers.0.fc.weight": (4, 4),
    "vision_tower.layers.1.fc.weight": (4, 4),
    "vision_tower.norm.weight": (4,),
    "multi_modal_projector.linear.weight": (4, 4),
}

# What is around the language model, its head and its tower, as classes of transformers have written it.
FORMS = {
    "older": ("language_model.model.", "language_model.", ""),
    "newer": ("model.language_model.", "", "model."),
    "within": ("thinker.model.", "thinker.", "thinker."),
    "plain": ("model.", "", ""),
    "bare": ("", "", ""),
}


def text(path: str, num_layers: int = 2, *, tied: bool = False) -> Checkpoint:
    found = llama(path, num_layers, tied=tied)
    assert isinstance(found, Checkpoint)
    return found


def in_form(form: str, name: str) -> str:
    inner, head, tower = FORMS[form]
    if name in TOWER:
        return tower + name
    return head + name if name.startswith("lm_head") else inner + name.removeprefix("model.")


def wrapped(path: str, form: str, num_layers: int = 2, *, tied: bool = False, towers: bool = True) -> Checkpoint:
    shapes: dict[str, Any] = dict(llama_shapes(num_layers, head=not tied)) | (TOWER if towers else {})
    config = {"text_config": {"num_hidden_layers": num_layers, "vocab_size": 10}, "tie_word_embeddings": tied}
    return checkpoint(path, {in_form(form, name): shape for name, shape in shapes.items()}, config)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_model_into_a_multimodal_one(form: str) -> None:
    vlm, txt = wrapped("/vlm", form), text("/txt")
    plan = plan_of(TASK.format(base="/vlm", other="/txt"), vlm, txt)
    found = expressions_of(plan)
    assert set(found) == set(vlm.tensors)
    for name in txt.tensors:
        own = in_form(form, name)
        assert isinstance(found[own], Merge)
        assert sources(found[own]) == [f"m1: {name}", f"m0: {own}"]
        assert found[own].keys == (f"0\n{own}\n/txt",)
    for name in TOWER:
        assert found[in_form(form, name)] == Load("m0", *vlm.tensors[in_form(form, name)])
    assert plan.dropped == {}
    told = f"the layers of /txt, model.layers.*, are merged as {in_form(form, 'model.layers')}.*"
    assert plan.warnings[0 : form != "plain"] == ((told,) if form != "plain" else ())
    assert len(plan.warnings) == 2 + (form != "plain")


@pytest.mark.parametrize("form", FORMS)
def test_a_multimodal_model_into_a_text_one(form: str) -> None:
    txt, vlm = text("/txt"), wrapped("/vlm", form)
    plan = plan_of(TASK.format(base="/txt", other="/vlm"), txt, vlm)
    found = expressions_of(plan)
    assert set(found) == set(txt.tensors)
    for name in txt.tensors:
        assert sources(found[name]) == [f"m1: {in_form(form, name)}", f"m0: {name}"]
    assert plan.dropped == {f"/vlm: {in_form(form, name)}": "left out, as /txt has none" for name in TOWER}
    assert plan.config == txt.config


@pytest.mark.parametrize(("ours", "theirs"), [("older", "newer"), ("newer", "older"), ("within", "newer")])
def test_multimodal_models_written_by_different_versions(ours: str, theirs: str) -> None:
    a, b = wrapped("/a", ours), wrapped("/b", theirs)
    found = expressions_of(plan_of(TASK.format(base="/a", other="/b"), a, b))
    assert set(found) == set(a.tensors)
    for name in (*llama_shapes(2), *TOWER):
        assert sources(found[in_form(ours, name)]) == [f"m1: {in_form(theirs, name)}", f"m0: {in_form(ours, name)}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_its_own_stands_where_the_donors_would(form: str) -> None:
    plan = plan_of(TASK.format(base="/vlm", other="/txt"), wrapped("/vlm", form, tied=True), text("/txt"))
    head = in_form(form, "lm_head.weight")
    embedding = in_form(form, "model.embed_tokens.weight")
    assert sources(expressions_of(plan)[head]) == ["m1: lm_head.weight", f"m0: {embedding}"]
    assert plan.config["tie_word_embeddings"] is False
    both = plan_of(TASK.format(base="/vlm", other="/txt"), wrapped("/vlm", form, tied=True), text("/txt", tied=True))
    assert head not in expressions_of(both)
    assert both.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("prefix", ["bert.", "transformer.", "text_model."])
def test_encoders_with_and_without_the_name_of_their_class(prefix: str) -> None:
    shapes = {
        "embeddings.word_embeddings.weight": (10, 4),
        "encoder.layer.0.fc.weight": (4, 4),
        "pooler.dense.weight": (4, 4),
    }
    a = checkpoint("/a", shapes, {"num_hidden_layers": 1})
    b = checkpoint("/b", {prefix + name: shape for name, shape in shapes.items()}, {"num_hidden_layers": 1})
    for donor, other, names in ((a, b, shapes), (b, a, [prefix + name for name in shapes])):
        plan = plan_of(TASK.format(base=donor.reference, other=other.reference), donor, other)
        assert set(expressions_of(plan)) == set(names)
        assert all(len(sources(x)) == 2 for x in expressions_of(plan).values())


def test_slices_of_a_text_model_in_a_multimodal_one() -> None:
    recipe = """
merge_method: passthrough
slices:
- sources: [{model: /vlm, layer_range: [0, 2]}]
- sources: [{model: /txt, layer_range: [1, 4]}]
"""
    plan = plan_of(recipe, wrapped("/vlm", "older"), text("/txt", 4))
    found = {name: sources(x) for name, x in expressions_of(plan).items()}
    assert found["language_model.model.layers.4.mlp.up_proj.weight"] == ["m1: model.layers.3.mlp.up_proj.weight"]
    assert found["language_model.lm_head.weight"] == ["m1: lm_head.weight"]
    assert set(TOWER) <= set(found)
    assert plan.config["text_config"]["num_hidden_layers"] == 5
    assert plan.dropped["/txt: model.layers.0.mlp.up_proj.weight"] == "no slice takes it"


def test_layers_of_other_names_are_refused_in_one_sentence() -> None:
    gpt = checkpoint("/gpt", {"transformer.h.0.mlp.c_fc.weight": (4, 4), "transformer.wte.weight": (10, 4)}, {})
    with pytest.raises(ModelError) as caught:
        plan_of(TASK.format(base="/vlm", other="/gpt"), wrapped("/vlm", "older"), gpt)
    assert caught.value.what == (
        "the models do not fit together: /gpt keeps its language model under transformer.h, "
        "/vlm under language_model.model.layers, whose names do not match"
    )


def test_layers_that_are_not_alike_are_refused_in_one_sentence() -> None:
    biased = {f"model.layers.{i}.self_attn.{x}_proj.bias": (4,) for i in range(2) for x in "qkvo"}
    txt = checkpoint("/txt", llama_shapes(2) | biased, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    recipe = TASK.format(base="/vlm", other="/txt")
    with pytest.raises(ModelError) as caught:
        plan_of(recipe, wrapped("/vlm", "older"), txt)
    stack = "language_model.model.layers"
    assert caught.value.what == (
        f"the models do not fit together: /txt keeps its language model under model.layers, /vlm under {stack}, and "
        f"only one of them has {', '.join(f'{stack}.*.self_attn.{x}_proj.bias' for x in 'koq')}, ..."
    )
    kept = plan_of("missing: base\n" + recipe, wrapped("/vlm", "older"), txt)
    assert set(expressions_of(kept)) == set(wrapped("/vlm", "older").tensors)
    assert {name.partition(": ")[2] for name in kept.dropped} == set(biased)


@pytest.mark.parametrize(
    ("own", "remedy"), [("mlp.experts.0.up.weight", "one class"), ("mlp.up.bias", "bring one into")]
)
def test_the_remedy_for_packed_and_single_experts_is_one_that_helps(own: str, remedy: str) -> None:
    shapes = llama_shapes(2) | {f"model.layers.{i}.{own}": (4,) for i in range(2)}
    txt = checkpoint("/txt", shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    with pytest.raises(ModelError) as caught:
        plan_of(TASK.format(base="/vlm", other="/txt"), wrapped("/vlm", "older"), txt)
    assert remedy in str(caught.value.remedy)


def test_constants_that_only_one_of_them_stores_do_not_matter() -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (2,) for i in range(2)}
    txt = checkpoint("/txt", llama_shapes(2) | buffers, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    plan = plan_of(TASK.format(base="/vlm", other="/txt"), wrapped("/vlm", "older"), txt)
    assert set(expressions_of(plan)) == set(wrapped("/vlm", "older").tensors)
    assert set(plan.dropped) == {f"/txt: {name}" for name in buffers}


def test_vocabularies_of_different_sizes() -> None:
    txt = llama("/txt", vocabulary=7)
    plan = plan_of(TASK.format(base="/vlm", other="/txt"), wrapped("/vlm", "older"), txt)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert expressions_of(plan)[name].spec.shape == (7, 4)
    assert plan.config["text_config"]["vocab_size"] == 7


def test_a_language_model_that_may_be_either_of_two_is_refused() -> None:
    shapes = dict(llama_shapes(2))
    twice = {f"{outer}.{name}": shape for name, shape in shapes.items() for outer in ("thinker", "language_model")}
    vlm = checkpoint("/vlm", twice, {"num_hidden_layers": 2, "tie_word_embeddings": False})
    with pytest.raises(ModelError) as caught:
        plan_of(TASK.format(base="/vlm", other="/txt"), vlm, text("/txt"))
    assert "and 'model.layers' may be any of 'language_model.model.layers', 'thinker.model.layers'" in caught.value.what
    assert "\n" not in caught.value.what
