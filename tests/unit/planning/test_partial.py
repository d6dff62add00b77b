"""Tensors that only some models have: copied, left out, or refused; and those that a recipe keeps out of the merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Load, Merge
from support.fake_checkpoints import LINEAR, checkpoint, expressions_of, llama_shapes, plan_of, sources, stack

TASK = "merge_method: task_arithmetic\nbase_model: /a\nmodels:\n- {model: /b, parameters: {weight: 1}}\n"
CONFIG = {"num_hidden_layers": 2, "tie_word_embeddings": False}
MTP = {"mtp.fc.weight": (4, 8), "mtp.norm.weight": (4,), "mtp.layers.0.self_attn.q_proj.weight": (4, 4)}
NEXTN = {"model.layers.2.eh_proj.weight": (4, 8), "model.layers.2.mlp.up_proj.weight": (6, 4)}
EXTRAS: dict[str, dict[str, Sequence[int]]] = {
    "mtp": MTP,
    "model.layers.2": NEXTN,
    "visual": {"visual.blocks.0.qkv.weight": (4, 4), "visual.norm.weight": (4,), "visual.embed.weight": (4, 4)},
    "score": {"score.weight": (2, 4)},
    "model.vision_tower": {f"model.vision_tower.layers.{i}.fc.weight": (4, 4) for i in range(3)},
    "model.mm_projector": {"model.mm_projector.0.weight": (4, 4)},
    "v_head": {"v_head.summary.weight": (1, 4), "v_head.summary.bias": (1,)},
}


def model(path: str, *extras: dict[str, Sequence[int]], **config: Any) -> Checkpoint:
    shapes: dict[str, Any] = dict(llama_shapes(2))
    for extra in extras:
        shapes |= extra
    return checkpoint(path, shapes, CONFIG | config)


def label(prefix: str, names: Sequence[str]) -> str:
    return f"{prefix}.* ({len(names)} tensors) are" if len(names) > 1 else f"{names[0]} is"


@pytest.mark.parametrize("prefix", EXTRAS)
def test_extras_of_the_donor_are_copied_with_one_warning(prefix: str) -> None:
    extra = EXTRAS[prefix]
    a, b = model("/a", extra), model("/b")
    plan = plan_of(TASK, a, b)
    found = expressions_of(plan)
    assert set(found) == set(a.tensors)
    for name in extra:
        assert found[name] == Load("m0", *a.tensors[name])
    assert all(isinstance(found[name], Merge) for name in b.tensors)
    assert plan.warnings == (f"{label(prefix, list(extra))} in /a, not in /b: copied from /a",)


@pytest.mark.parametrize("prefix", EXTRAS)
def test_extras_that_the_donor_lacks_are_left_out_with_one_warning(prefix: str) -> None:
    extra = EXTRAS[prefix]
    plan = plan_of(TASK, model("/a"), model("/b", extra))
    assert set(expressions_of(plan)) == set(llama_shapes(2))
    assert plan.dropped == {f"/b: {name}": "left out, as /a has none" for name in extra}
    assert plan.warnings == (f"{label(prefix, list(extra))} in /b, not in /a: left out, as /a has none",)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.bias", (4,)),
        ("model.embed_positions.weight", (8, 4)),
        ("model.post_norm.weight", (4,)),
        ("norm.weight", (4,)),
        ("model.norm.bias", (4,)),
        ("lm_head.bias", (10,)),
        ("model.something.weight", (4, 4)),  # beside the layers, where norms and projections stand
    ],
)
def test_parts_that_every_model_needs_must_be_in_all(name: str, shape: tuple[int, ...]) -> None:
    for a, b in ((model("/a", {name: shape}), model("/b")), (model("/a"), model("/b", {name: shape}))):
        with pytest.raises(ModelError, match=f"{name.replace('.', '[.]')}: in /., not in /."):
            plan_of(TASK, a, b)


def test_a_head_and_an_embedding_must_be_in_all() -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        shapes = llama_shapes(2)
        del shapes[name]
        with pytest.raises(ModelError, match=f"{name}: in /a, not in /b"):
            plan_of(TASK, model("/a"), checkpoint("/b", shapes, CONFIG))


def test_parts_of_an_extra_that_both_have_in_another_form_are_refused() -> None:
    """A tower of more layers, or with biases, is another tower."""
    fewer, more = ({f"visual.blocks.{i}.qkv.weight": (4, 4) for i in range(n)} for n in (2, 4))
    with pytest.raises(ModelError, match=r"visual\.blocks\.\*\.\* \(2 tensors\): in /b, not in /a"):
        plan_of(TASK, model("/a", fewer), model("/b", more))
    biased = fewer | {f"visual.blocks.{i}.qkv.bias": (4,) for i in range(2)}
    with pytest.raises(ModelError, match=r"visual\.blocks\.\*\.qkv\.bias \(2 tensors\): in /b, not in /a"):
        plan_of(TASK, model("/a", fewer), model("/b", biased))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.eh_proj\.weight: in /a, not in /b"):
        plan_of(TASK, model("/a", NEXTN), model("/b", {"model.layers.2.mlp.up_proj.weight": (6, 4)}))


def test_one_line_for_what_all_layers_lack() -> None:
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": (4,) for i in range(2)}
    with pytest.raises(ModelError) as caught:
        plan_of(TASK, model("/a", biases), model("/b"))
    assert caught.value.what.splitlines()[1:] == [
        "  model.layers.*.self_attn.q_proj.bias (2 tensors): in /a, not in /b"
    ]


def test_heads_and_poolers_of_encoders() -> None:
    """A classifier tuned from a masked language model: each has a head that the other lacks."""
    body = {
        "bert.embeddings.word_embeddings.weight": (10, 4),
        "bert.embeddings.LayerNorm.weight": (4,),
        "bert.encoder.layer.0.output.dense.weight": (4, 4),
    }
    heads = {"cls.predictions.bias": (10,), "cls.predictions.transform.dense.weight": (4, 4)}
    own = {"bert.pooler.dense.weight": (4, 4), "classifier.weight": (2, 4), "classifier.bias": (2,)}
    a, b = (checkpoint(path, body | extra, {"num_hidden_layers": 1}) for path, extra in (("/a", heads), ("/b", own)))
    plan = plan_of(TASK, a, b)
    assert {name: len(sources(x)) for name, x in expressions_of(plan).items()} == (
        dict.fromkeys(body, 2) | dict.fromkeys(heads, 1)
    )
    assert set(plan.warnings) == {
        "cls.* (2 tensors) are in /a, not in /b: copied from /a",
        "bert.pooler.dense.weight is in /b, not in /a: left out, as /a has none",
        "classifier.* (2 tensors) are in /b, not in /a: left out, as /a has none",
    }
    for name in ("bert.embeddings.LayerNorm.weight", "bert.embeddings.word_embeddings.weight"):
        lacking = {other: shape for other, shape in body.items() if other != name}
        with pytest.raises(ModelError, match=name):
            plan_of(TASK, a, checkpoint("/b", lacking, {"num_hidden_layers": 1}))


# -- what the recipe says ---------------------------------------------------------------------------------------------


BIAS = {"model.layers.1.self_attn.q_proj.bias": (4,)}


@pytest.mark.parametrize("extra", [MTP, BIAS])
@pytest.mark.parametrize(
    ("missing", "in_a", "in_b"), [("base", "m0", None), ("first", "m0", "m1"), ("drop", None, None)]
)
def test_missing(missing: str, in_a: str | None, in_b: str | None, extra: dict[str, Sequence[int]]) -> None:
    for a, b, source in ((model("/a", extra), model("/b"), in_a), (model("/a"), model("/b", extra), in_b)):
        plan = plan_of(f"missing: {missing}\n{TASK}", a, b)
        found = expressions_of(plan)
        assert {name for name in extra if name in found} == (set(extra) if source else set())
        for name in extra if source else ():
            assert sources(found[name]) == [f"{source}: {name}"]
        assert len(plan.warnings) == 1


def test_missing_error_refuses_extras() -> None:
    with pytest.raises(ModelError, match=r"mtp\.\* \(3 tensors\): in /a, not in /b"):
        plan_of("missing: error\n" + TASK, model("/a", MTP), model("/b"))


def test_what_is_copied_is_stored_in_the_dtype_of_the_output() -> None:
    plan = plan_of("dtype: float32\n" + TASK, model("/a", MTP), model("/b"))
    found = expressions_of(plan)["mtp.fc.weight"]
    assert isinstance(found, Cast)
    assert found.dtype is DType.F32


@pytest.mark.parametrize("extra", [MTP, NEXTN])
def test_a_config_counts_no_layers_that_are_dropped(extra: dict[str, Sequence[int]]) -> None:
    donor = model("/a", extra, num_nextn_predict_layers=1)
    assert plan_of(TASK, donor, model("/b")).config["num_nextn_predict_layers"] == 1
    assert plan_of("missing: drop\n" + TASK, donor, model("/b")).config["num_nextn_predict_layers"] == 0


# -- slices -----------------------------------------------------------------------------------------------------------


def sliced(*ranges: tuple[int, int]) -> str:
    slices = "".join(
        f"- sources: [{{model: /b, layer_range: [{i}, {j}], parameters: {{weight: 1}}}}]\n" for i, j in ranges
    )
    return f"merge_method: task_arithmetic\nbase_model: /a\nslices:\n{slices}"


@pytest.mark.parametrize("ranges", [[(0, 2)], [(0, 1), (1, 2)]])
@pytest.mark.parametrize("extra", [MTP, NEXTN])
def test_slices_over_all_layers_keep_what_models_keep(
    ranges: list[tuple[int, int]], extra: dict[str, Sequence[int]]
) -> None:
    a, b = model("/a", extra, num_nextn_predict_layers=1), model("/b")
    plan, whole = plan_of(sliced(*ranges), a, b), plan_of(TASK, a, b)
    assert {n: sources(x) for n, x in expressions_of(plan).items()} == {
        n: sources(x) for n, x in expressions_of(whole).items()
    }
    assert plan.config == whole.config
    assert plan.warnings == whole.warnings


@pytest.mark.parametrize("ranges", [[(0, 1)], [(0, 2), (1, 2)], [(1, 2), (0, 1)]])
@pytest.mark.parametrize(("prefix", "extra"), [("mtp", MTP), ("model.layers.2", NEXTN)])
def test_a_stack_that_is_cut_anew_has_no_layers_beyond(
    ranges: list[tuple[int, int]], prefix: str, extra: dict[str, Sequence[int]]
) -> None:
    a, b = (model(path, extra, num_nextn_predict_layers=1) for path in ("/a", "/b"))
    plan = plan_of(sliced(*ranges), a, b)
    assert len(expressions_of(plan)) == 3 + 3 * sum(j - i for i, j in ranges)
    assert plan.config["num_nextn_predict_layers"] == 0
    told = f"{prefix}.* ({len(extra)} tensors) are in /b, /a: left out, as the layers are cut anew"
    assert plan.warnings == (told,)
    for path in ("/a", "/b"):
        assert all(plan.dropped[f"{path}: {name}"] == "left out, as the layers are cut anew" for name in extra)


def test_a_tower_stays_where_the_last_slice_is_of_a_model_without_one() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /b, layer_range: [1, 2]}]
"""
    tower = EXTRAS["visual"]
    found = stack(text, model("/a", tower), model("/b"))
    assert {name for name in found if name.startswith("visual")} == set(tower)
    assert found["model.norm.weight"] == ["m1: model.norm.weight"]


def test_extras_of_a_donor_that_is_not_merged_are_copied() -> None:
    plan = plan_of("base_model: /c\n" + LINEAR, model("/c", MTP), model("/a"), model("/b", MTP))
    found = expressions_of(plan)
    assert all(sources(found[name]) == [f"m0: {name}"] for name in MTP)
    assert plan_of("base_model: /c\n" + LINEAR, model("/c", MTP), model("/a"), model("/b")).warnings == (
        "mtp.* (3 tensors) are in /c, not in /a, /b: copied from /c",
    )


# -- what is not merged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "key"),
    [
        ("exclude: [lm_head.weight, '*.mlp.*']", "m0"),
        ("exclude: [lm_head.weight, '*.mlp.*']\nfrom: /b", "m1"),
        ("include: ['model.*']\nexclude: '*.mlp.*'\nfrom: /b", "m1"),
        ("include: ['*.self_attn.*', '*norm*', '*embed*']", "m0"),
    ],
)
def test_what_is_not_merged_is_copied_from_one_model(rules: str, key: str) -> None:
    plan = plan_of(f"{rules}\n{TASK}", model("/a"), model("/b"))
    found = expressions_of(plan)
    copied = {name for name in found if isinstance(found[name], Load)}
    assert copied == {name for name in found if ".mlp." in name or name == "lm_head.weight"}
    assert all(sources(found[name]) == [f"{key}: {name}"] for name in copied)
    other = "/b" if key == "m0" else "/a"
    assert set(plan.dropped) == {f"{other}: {name}" for name in copied}


def test_what_is_not_merged_keeps_its_place_in_slices() -> None:
    text = "exclude: '*.mlp.*'\n" + sliced((1, 2), (0, 1))
    found = stack(text, model("/a"), model("/b"))
    assert found["model.layers.0.mlp.up_proj.weight"] == ["m0: model.layers.1.mlp.up_proj.weight"]
    assert found["model.layers.1.mlp.up_proj.weight"] == ["m0: model.layers.0.mlp.up_proj.weight"]


def test_what_is_not_merged_may_be_lacking_elsewhere() -> None:
    found = stack("exclude: '*_proj.bias'\nfrom: /b\n" + TASK, model("/a"), model("/b", BIAS))
    assert found["model.layers.1.self_attn.q_proj.bias"] == ["m1: model.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(ModelError, match=r"q_proj\.bias: in /b, not in /a"):
        plan_of("exclude: '*_proj.bias'\n" + TASK, model("/a"), model("/b", BIAS))


def test_vocabularies_that_are_not_merged_are_kept_whole_or_cut_together() -> None:
    def sized(path: str, rows: int) -> Checkpoint:
        return checkpoint(path, llama_shapes(2, vocabulary=rows), CONFIG | {"vocab_size": rows})

    both = plan_of("exclude: [lm_head.weight, '*embed*']\n" + TASK, sized("/a", 10), sized("/b", 7))
    assert {x.spec.shape for n, x in expressions_of(both).items() if "head" in n or "embed" in n} == {(10, 4)}
    assert both.config["vocab_size"] == 10
    one = plan_of("exclude: lm_head.weight\n" + TASK, sized("/a", 10), sized("/b", 7))
    assert {x.spec.shape for n, x in expressions_of(one).items() if "head" in n or "embed" in n} == {(7, 4)}
    assert one.config["vocab_size"] == 7


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_name_tensors(key: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(f"{key}: ['*', lm_heads.weight]\n{TASK}", model("/a"), model("/b"))
    assert caught.value.where == key
    assert caught.value.what == ("no tensor of the output matches 'lm_heads.weight'; did you mean 'lm_head.weight'?")


def test_a_model_to_copy_from_is_one_of_the_slice() -> None:
    text = "exclude: '*.mlp.*'\nfrom: /c\n" + sliced((1, 2), (0, 1)).replace(
        "[{model: /b, layer_range: [0, 1], parameters: {weight: 1}}]",
        "[{model: /b, layer_range: [0, 1], parameters: {weight: 1}}, "
        "{model: /c, layer_range: [0, 1], parameters: {weight: 1}}]",
    )
    with pytest.raises(PlanError, match=r"up_proj\.weight' is to come from /c, which is not in the slice"):
        plan_of(text, model("/a"), model("/b"), model("/c"))
