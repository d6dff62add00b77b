"""Lowering of dense recipes: which bytes of which model make each output tensor."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Load, Merge, Scale, loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.make import make_plan
from support.fake_checkpoints import checkpoint, expressions_of, llama, llama_shapes, plan_of

LINEAR = """
merge_method: linear
models:
- {model: /a, parameters: {weight: 0.25}}
- {model: /b, parameters: {weight: 0.75}}
"""


def sources(expression: Any) -> list[str]:
    """``model: tensor`` of everything that is read."""
    return [f"m{load.model[1:]}: {load.spec.name}" for load in loads(expression)]


def stack(text: str, *models: Any) -> dict[str, list[str]]:
    """What each output tensor is made of."""
    return {name: sources(expression) for name, expression in expressions_of(plan_of(text, *models)).items()}


def test_models_merge_tensor_by_tensor() -> None:
    a, b = llama("/a"), llama("/b")
    plan = plan_of(LINEAR, a, b)
    found = expressions_of(plan)
    assert set(found) == set(a.tensors)
    for name, expression in found.items():
        spec, location = a.tensors[name]
        assert expression == Merge(
            method="linear",
            spec=spec,
            inputs=(Load("m0", spec, location), Load("m1", spec, b.tensors[name][1])),
            base=None,
            parameters={"normalize": True},
            input_parameters=({"weight": 0.25}, {"weight": 0.75}),
            keys=(f"0\n{name}\n/a", f"0\n{name}\n/b"),
            compute_dtype=DType.F32,
        )
    assert plan.dropped == {}
    assert plan.aliased == {}
    assert plan.warnings == ()


def test_frankenmerge_repeats_reorders_and_mixes_layers() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /b, layer_range: [1, 3]}]
- sources: [{model: /a, layer_range: [1, 2]}]
"""
    plan = plan_of(text, llama("/a", 3), llama("/b", 3))
    found = {name: sources(expression) for name, expression in expressions_of(plan).items()}
    norms = [found[f"model.layers.{i}.input_layernorm.weight"] for i in range(5)]
    wanted = [("m0", 0), ("m0", 1), ("m1", 1), ("m1", 2), ("m0", 1)]
    assert norms == [[f"{model}: model.layers.{i}.input_layernorm.weight"] for model, i in wanted]
    assert len(found) == 3 + 5 * 3
    assert found["model.embed_tokens.weight"] == ["m0: model.embed_tokens.weight"]
    assert found["lm_head.weight"] == ["m0: lm_head.weight"]  # the last slice's model
    assert plan.config["num_hidden_layers"] == 5
    # Every tensor that no slice takes is named.
    assert set(plan.dropped) == {
        *(f"/a: {name}" for name in llama_shapes(3) if ".2." in name),
        *(f"/b: {name}" for name in llama_shapes(3) if ".0." in name or ".layers." not in name),
    }
    assert set(plan.dropped.values()) == {"no slice takes it"}


def test_sources_of_a_slice_may_take_different_layers() -> None:
    text = """
merge_method: linear
slices:
- sources:
  - {model: /a, layer_range: [0, 2], parameters: {weight: 1}}
  - {model: /b, layer_range: [2, 4], parameters: {weight: 1}}
"""
    found = stack(text, llama("/a", 4), llama("/b", 4))
    assert found["model.layers.1.mlp.up_proj.weight"] == [
        "m0: model.layers.1.mlp.up_proj.weight",
        "m1: model.layers.3.mlp.up_proj.weight",
    ]


@pytest.mark.parametrize("listed", [True, False])
def test_a_base_is_subtracted_and_never_an_input(listed: bool) -> None:
    text = """
merge_method: task_arithmetic
base_model: /a
models:
- {model: /b, parameters: {weight: 0.5}}
""" + ("- {model: /a}\n" if listed else "")
    for expression in expressions_of(plan_of(text, llama("/a"), llama("/b"))).values():
        assert [load.model for load in expression.inputs] == ["m1"]
        assert expression.base.model == "m0"


def test_base_takes_its_own_layers_where_it_is_listed_and_those_of_the_sources_where_not() -> None:
    def text(extra: str) -> str:
        return f"""
merge_method: ties
base_model: /a
slices:
- sources:
  - {{model: /b, layer_range: [2, 4], parameters: {{weight: 1}}}}
  {extra}
"""

    models = llama("/a", 4), llama("/b", 4)
    own = stack(text("- {model: /a, layer_range: [0, 2]}"), *models)
    shared = stack(text(""), *models)
    name = "model.layers.0.mlp.up_proj.weight"
    assert own[name] == ["m1: model.layers.2.mlp.up_proj.weight", f"m0: {name}"]
    assert shared[name] == ["m1: model.layers.2.mlp.up_proj.weight", "m0: model.layers.2.mlp.up_proj.weight"]


def test_base_layers_must_be_given_where_sources_differ() -> None:
    """Also where a recipe was built in Python and not checked against its method."""
    sources = [
        {"model": f"/{m}", "layer_range": [i, i + 2], "parameters": {"weight": 1}} for m, i in (("b", 0), ("c", 2))
    ]
    recipe = DenseRecipe.model_validate({"merge_method": "ties", "base_model": "/a", "slices": [{"sources": sources}]})
    with pytest.raises(PlanError, match="the base model's are not given"):
        make_plan(recipe, {ModelReference(path): llama(path, 4) for path in ("/a", "/b", "/c")})


def test_a_model_listed_twice_has_two_streams_of_randomness() -> None:
    text = """
merge_method: dare_linear
base_model: /a
seed: 5
models:
- {model: /b, parameters: {weight: 0.5, density: 0.5}}
- {model: /b, parameters: {weight: 0.5, density: 0.5}}
"""
    for name, expression in expressions_of(plan_of(text, llama("/a"), llama("/b"))).items():
        assert expression.keys == (f"5\n{name}\n/b", f"5\n{name}\n/b\n2")


def test_a_base_beside_a_method_without_one_is_only_the_donor() -> None:
    plan = plan_of("base_model: /c\n" + LINEAR, llama("/c", dtype=DType.F32), llama("/a"), llama("/b"))
    assert {load.model for x in expressions_of(plan).values() for load in loads(x)} == {"m1", "m2"}
    assert all(x.base is None for x in expressions_of(plan).values())
    assert plan.inputs["m0"].files == {}
    assert plan.config["torch_dtype"] == "bfloat16"
    assert plan.dropped == {}  # a model of which nothing is read has nothing to drop


def test_gradients_over_the_layers() -> None:
    text = """
merge_method: linear
models:
- {model: /a, parameters: {weight: [0.0, 1.0, 0.5]}}
- {model: /b, parameters: {weight: [{filter: mlp, value: [1, 0]}, {value: 0.5}]}}
parameters: {normalize: [{filter: norm, value: 1.0}, {value: false}]}
"""
    found = expressions_of(plan_of(text, llama("/a", 5), llama("/b", 5)))

    def weights(name: str) -> list[float]:
        return [parameters["weight"] for parameters in found[name].input_parameters]

    # t = i/4; the first gradient has its knots at 0, 1/2 and 1.
    expected_a = [0.0, 0.5, 1.0, 0.75, 0.5]
    for i in range(5):
        assert weights(f"model.layers.{i}.mlp.up_proj.weight") == [expected_a[i], 1 - i / 4]
        assert weights(f"model.layers.{i}.self_attn.q_proj.weight") == [expected_a[i], 0.5]
    # Outside the layers t = 0.
    assert weights("model.embed_tokens.weight") == [0.0, 0.5]
    assert weights("lm_head.weight") == [0.0, 0.5]
    assert found["model.norm.weight"].parameters == {"normalize": True}
    assert found["lm_head.weight"].parameters == {"normalize": False}


def test_gradients_span_each_slice_and_a_single_layer_sees_their_end() -> None:
    text = """
merge_method: linear
slices:
- sources: [{model: /a, layer_range: [0, 3], parameters: {weight: [0, 1]}}]
- sources: [{model: /a, layer_range: [3, 4], parameters: {weight: [0, 1]}}]
"""
    found = expressions_of(plan_of(text, llama("/a", 4)))
    weights = [found[f"model.layers.{i}.input_layernorm.weight"].input_parameters[0]["weight"] for i in range(4)]
    assert weights == [0.0, 0.5, 1.0, 1.0]


def test_filters_see_the_output_name() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 1]}]
- sources:
  - {model: /a, layer_range: [0, 1], parameters: {scale: [{filter: layers.1.mlp, value: 0.0}, {value: 1.0}]}}
"""
    found = expressions_of(plan_of(text, llama("/a", 1)))
    assert isinstance(found["model.layers.0.mlp.up_proj.weight"], Load)
    assert isinstance(found["model.layers.1.mlp.up_proj.weight"], Scale)
    assert isinstance(found["model.layers.1.self_attn.q_proj.weight"], Load)


def test_tied_models_make_a_tied_model() -> None:
    plan = plan_of(LINEAR, llama("/a", tied=True), llama("/b", tied=True))
    assert "lm_head.weight" not in expressions_of(plan)
    assert plan.config["tie_word_embeddings"] is True


def test_a_stored_copy_of_a_tied_head_is_an_alias() -> None:
    config = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    plan = plan_of(LINEAR, checkpoint("/a", llama_shapes(2), config), llama("/b", tied=True))
    assert "lm_head.weight" not in expressions_of(plan)
    assert plan.aliased == {"lm_head.weight": "model.embed_tokens.weight"}
    assert plan.dropped == {}


@pytest.mark.parametrize("tied_first", [True, False])
def test_tied_beside_untied_gives_a_head_of_its_own(tied_first: bool) -> None:
    a, b = llama("/a", tied=tied_first), llama("/b", tied=not tied_first)
    plan = plan_of(LINEAR, a, b)
    tied_key = "m0" if tied_first else "m1"
    found = expressions_of(plan)["lm_head.weight"]
    assert found.spec.name == "lm_head.weight"
    assert {x.model: x.spec.name for x in found.inputs} == {
        "m0": "lm_head.weight",
        "m1": "lm_head.weight",
        tied_key: "model.embed_tokens.weight",
    }
    assert plan.config["tie_word_embeddings"] is False


def test_tied_models_whose_ends_differ_are_untied() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 1]}]
- sources: [{model: /b, layer_range: [1, 2]}]
"""
    plan = plan_of(text, llama("/a", tied=True), llama("/b", tied=None))
    found = {name: sources(x) for name, x in expressions_of(plan).items()}
    assert found["model.embed_tokens.weight"] == ["m0: model.embed_tokens.weight"]
    assert found["lm_head.weight"] == ["m1: model.embed_tokens.weight"]
    assert plan.config["tie_word_embeddings"] is False


def test_vocabularies_are_cut_to_the_smaller_one() -> None:
    a, b = llama("/a", vocabulary=10), llama("/b", vocabulary=7)
    plan = plan_of(LINEAR, a, b)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expression = expressions_of(plan)[name]
        assert expression.spec.shape == (7, 4)
        for load, model in zip(expression.inputs, (a, b), strict=True):
            whole = model.tensors[name][1]
            assert load.spec.shape == (7, 4)
            assert (load.location.start, load.location.end) == (whole.start, whole.start + 7 * 4 * 2)
    assert plan.config["vocab_size"] == 7
    assert any("model.embed_tokens.weight has between 7 and 10 rows" in warning for warning in plan.warnings)


def test_other_shapes_must_match_and_all_mismatches_are_listed() -> None:
    with pytest.raises(ModelError) as caught:
        plan_of(LINEAR, llama("/a", inner=6), llama("/b", inner=8))
    lines = caught.value.what.splitlines()[1:]
    assert lines == [
        f"  model.layers.{i}.mlp.up_proj.weight: different shapes (/a: [6, 4], /b: [8, 4])" for i in (0, 1)
    ]


def test_a_long_list_of_mismatches_is_counted() -> None:
    with pytest.raises(ModelError, match=r"\.\.\. and 8 more"):
        plan_of(LINEAR, llama("/a", 20, inner=6), llama("/b", 20, inner=8))


def test_tensors_that_one_model_lacks_are_named_both_ways() -> None:
    shapes_a, shapes_b = llama_shapes(1), llama_shapes(1)
    shapes_a["model.layers.0.self_attn.q_proj.bias"] = (4,)
    shapes_b["model.extra.weight"] = (4,)
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    with pytest.raises(ModelError) as caught:
        plan_of(LINEAR, checkpoint("/a", shapes_a, config), checkpoint("/b", shapes_b, config))
    assert "model.layers.0.self_attn.q_proj.bias: in /a, not in /b" in caught.value.what
    assert "model.extra.weight: in /b, not in /a" in caught.value.what


def test_a_tower_that_one_model_lacks_is_named() -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    deeper = llama_shapes(1) | {f"visual.blocks.{i}.qkv.weight": (4, 4) for i in range(2)}
    tower = llama_shapes(1) | {"visual.blocks.0.qkv.weight": (4, 4)}
    with pytest.raises(ModelError, match=r"visual\.blocks\.1\.qkv\.weight: in /b, not in /a"):
        plan_of(LINEAR, checkpoint("/a", tower, config), checkpoint("/b", deeper, config))
    with pytest.raises(ModelError, match=r"visual\.blocks\.0\.qkv\.weight: in /b, not in /a"):
        plan_of(LINEAR, llama("/a", 1), checkpoint("/b", deeper, config))


def test_a_vision_tower_is_merged_beside_slices_of_the_language_model() -> None:
    shapes = llama_shapes(2) | {f"visual.blocks.{i}.qkv.weight": (4, 4) for i in range(3)}
    config = {"num_hidden_layers": 2, "tie_word_embeddings": False}
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /a, layer_range: [1, 2]}]
"""
    plan = plan_of(text, checkpoint("/a", shapes, config))
    found = expressions_of(plan)
    assert {name for name in found if name.startswith("visual")} == {f"visual.blocks.{i}.qkv.weight" for i in range(3)}
    assert plan.config["num_hidden_layers"] == 3


@pytest.mark.parametrize("dtype", [DType.I64, DType.BOOL, DType.U8])
def test_what_is_not_floating_is_copied_from_the_donor(dtype: DType) -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    shapes = llama_shapes(1) | {"model.codes": (dtype, (3,))}
    plan = plan_of("dtype: float32\n" + LINEAR, checkpoint("/a", shapes, config), checkpoint("/b", shapes, config))
    found = expressions_of(plan)["model.codes"]
    assert isinstance(found, Load)
    assert (found.model, found.spec.dtype) == ("m0", dtype)
    assert plan.dropped == {"/b: model.codes": "not floating point: that of /a is copied"}


def test_integers_that_differ_in_shape_are_refused() -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    a, b = ({**llama_shapes(1), "model.codes": (DType.I64, (n,))} for n in (3, 4))
    with pytest.raises(ModelError, match=r"model\.codes: not a weight .*/a: I64 \[3\], /b: I64 \[4\]"):
        plan_of(LINEAR, checkpoint("/a", a, config), checkpoint("/b", b, config))


def test_constants_are_copied_from_the_donor_and_left_out_where_not_all_have_them() -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    having = llama_shapes(1) | {name: (DType.F32, (2,))}
    both = plan_of("dtype: bfloat16\n" + LINEAR, checkpoint("/a", having, config), checkpoint("/b", having, config))
    found = expressions_of(both)[name]
    assert isinstance(found, Load)
    assert (found.model, found.spec.dtype) == ("m0", DType.F32)
    assert list(both.dropped) == [f"/b: {name}"]
    one = plan_of(LINEAR, llama("/a", 1), checkpoint("/b", having, config))
    assert name not in expressions_of(one)
    assert list(one.dropped) == [f"/b: {name}"]


def test_codes_of_8_bit_floats_are_refused() -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    shapes = llama_shapes(1) | {"model.layers.0.mlp.up_proj.weight": (DType.F8_E4M3, (6, 4))}
    with pytest.raises(ModelError, match=r"up_proj\.weight: stored as 8-bit floats \(F8_E4M3\) in /b"):
        plan_of(LINEAR, llama("/a", 1), checkpoint("/b", shapes, config))


def test_quantised_models_are_refused_by_name() -> None:
    quantised = checkpoint(
        "/b", llama_shapes(1), {"num_hidden_layers": 1, "quantization_config": {"quant_method": "awq"}}
    )
    with pytest.raises(ModelError) as caught:
        plan_of(LINEAR, llama("/a", 1), quantised)
    assert caught.value.where == "model /b"
    assert "quantised (awq)" in caught.value.what


def test_tensors_outside_the_index_are_named() -> None:
    a = llama("/a", 1)
    b = checkpoint("/b", llama_shapes(1), a.config, unindexed=["old.weight"], warnings=["two files"])
    plan = plan_of(LINEAR, a, b)
    assert plan.dropped == {"/b: old.weight": "in a weight file, but not in the checkpoint's index"}
    assert plan.warnings == ("two files",)


PASSTHROUGH = """
merge_method: passthrough
models:
- {model: /a, parameters: {scale: [{filter: mlp, value: 0.5}, {filter: q_proj, value: 1.0}]}}
"""


def test_passthrough_copies_bytes_where_nothing_is_asked_for() -> None:
    a = llama("/a", 1)
    found = expressions_of(plan_of(PASSTHROUGH, a))
    assert found.pop("model.layers.0.mlp.up_proj.weight") == Scale(
        Load("m0", *a.tensors["model.layers.0.mlp.up_proj.weight"]), 0.5, DType.BF16, DType.F32
    )
    assert found == {name: Load("m0", *a.tensors[name]) for name in found}
    assert len(found) == 5


def test_passthrough_casts_where_another_dtype_is_stored() -> None:
    found = expressions_of(plan_of("out_dtype: float16\n" + PASSTHROUGH, llama("/a", 1)))
    assert found["model.layers.0.mlp.up_proj.weight"].dtype is DType.F16
    assert isinstance(found["model.layers.0.self_attn.q_proj.weight"], Cast)
    assert all(expression.spec.dtype is DType.F16 for expression in found.values())


@pytest.mark.parametrize(
    ("settings", "inputs", "stored", "compute"),
    [
        ("", (DType.BF16, DType.BF16), DType.BF16, DType.F32),
        ("", (DType.BF16, DType.F16), DType.F32, DType.F32),
        ("", (DType.F64, DType.BF16), DType.F64, DType.F32),
        ("dtype: float16", (DType.BF16, DType.F32), DType.F16, DType.F32),
        ("dtype: float32\nout_dtype: bfloat16", (DType.BF16, DType.BF16), DType.BF16, DType.F32),
        ("out_dtype: float16", (DType.BF16, DType.F32), DType.F16, DType.F32),
        ("compute_dtype: float64", (DType.BF16, DType.BF16), DType.BF16, DType.F64),
        ("compute_dtype: inputs", (DType.BF16, DType.BF16), DType.BF16, DType.BF16),
        ("compute_dtype: inputs", (DType.BF16, DType.F16), DType.F32, DType.F32),
        ("compute_dtype: inputs\ndtype: float16", (DType.BF16, DType.BF16), DType.F16, DType.F16),
        ("compute_dtype: inputs\ndtype: float32\nout_dtype: float16", (DType.BF16,) * 2, DType.F16, DType.F32),
    ],
)
def test_dtypes(settings: str, inputs: tuple[DType, DType], stored: DType, compute: DType) -> None:
    plan = plan_of(settings + LINEAR, llama("/a", dtype=inputs[0]), llama("/b", dtype=inputs[1]))
    for expression in expressions_of(plan).values():
        assert expression.spec.dtype is stored
        assert expression.compute_dtype is compute
        assert tuple(load.spec.dtype for load in expression.inputs) == inputs
    assert plan.config["torch_dtype"] == stored.config_name


def test_layer_ranges_beyond_a_model_are_refused() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [1, 4]}]
"""
    with pytest.raises(PlanError) as caught:
        plan_of(text, llama("/a", 3))
    assert "layer_range [1, 4] goes beyond the model's 3 layers" in caught.value.what
    assert caught.value.where == "model /a"


def test_layer_ranges_beyond_the_base_are_refused() -> None:
    text = """
merge_method: task_arithmetic
base_model: /a
slices:
- sources: [{model: /b, layer_range: [1, 4], parameters: {weight: 1}}]
"""
    with pytest.raises(PlanError, match="goes beyond the model's 3 layers") as caught:
        plan_of(text, llama("/a", 3), llama("/b", 4))
    assert caught.value.where == "model /a"


def test_models_of_different_depth_need_slices() -> None:
    with pytest.raises(ModelError, match=r"different numbers of layers \(/a: 2, /b: 3\)"):
        plan_of(LINEAR, llama("/a", 2), llama("/b", 3))


def mtp(path: str) -> Any:
    shapes = llama_shapes(2) | {"model.layers.2.eh_proj.weight": (4, 8), "model.layers.2.mlp.up_proj.weight": (6, 4)}
    return checkpoint(
        path, shapes, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "tie_word_embeddings": False}
    )


def test_layers_beyond_the_stack_are_merged_and_kept() -> None:
    plan = plan_of(LINEAR, mtp("/a"), mtp("/b"))
    assert "model.layers.2.eh_proj.weight" in expressions_of(plan)
    assert plan.config["num_nextn_predict_layers"] == 1


def test_layers_beyond_the_stack_do_not_collide_with_a_deeper_output() -> None:
    text = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /a, layer_range: [0, 2]}]
"""
    plan = plan_of(text, mtp("/a"))
    found = {name: sources(x) for name, x in expressions_of(plan).items()}
    assert found["model.layers.2.mlp.up_proj.weight"] == ["m0: model.layers.0.mlp.up_proj.weight"]
    assert "model.layers.2.eh_proj.weight" not in found
    assert plan.dropped["/a: model.layers.2.eh_proj.weight"] == "no slice takes it"
    assert plan.config["num_nextn_predict_layers"] == 0


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


def test_a_plan_reads_and_names_every_tensor_once(sliced_plan: Plan) -> None:
    read = {(load.model, load.spec.name) for x in expressions_of(sliced_plan).values() for load in loads(x)}
    named = set(sliced_plan.dropped)
    for key, model in sliced_plan.inputs.items():
        for name in llama_shapes(3):
            assert ((key, name) in read) != (f"{model.reference}: {name}" in named)


@pytest.fixture(params=["[0, 1]", "[1, 3]", "[2, 3]"])
def sliced_plan(request: pytest.FixtureRequest) -> Plan:
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: /a, layer_range: {request.param}}}]
- sources: [{{model: /b, layer_range: {request.param}}}]
"""
    return plan_of(text, llama("/a", 3), llama("/b", 3))
