"""Lowering of dense recipes: which bytes of which model make each output tensor."""

from __future__ import annotations

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Load, Merge, Scale, loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.make import make_plan
from support.fake_checkpoints import LINEAR, checkpoint, expressions_of, llama, llama_shapes, plan_of, sources, stack


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
parameters: {normalize: false}
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
        ("compute_dtype: inputs", (DType.BF16, DType.F16), DType.F32, DType.F32),
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


@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", DType.BF16), ("float16", DType.F16)])
def test_arithmetic_in_the_inputs_dtype(dtype: str, compute: DType) -> None:
    """Where mergekit widens, so do we; but what it widens has been rounded to ``dtype``."""
    settings = f"compute_dtype: inputs\ndtype: {dtype}\n"
    models = [llama(path, dtype=DType.BF16) for path in ("/a", "/b")]
    task = "merge_method: task_arithmetic\nbase_model: /a\nmodels:\n- {model: /b, parameters: {weight: 1}}\n"
    for expression in expressions_of(plan_of(settings + task, *models)).values():
        assert expression.compute_dtype is compute
    for expression in expressions_of(plan_of(settings + LINEAR, *models)).values():
        assert expression.compute_dtype is DType.F32
        assert all(x.spec.dtype is compute for x in expression.inputs)
        assert all(isinstance(x, Load) == (compute is DType.BF16) for x in expression.inputs)


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


def mtp(path: str) -> Checkpoint:
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
    assert plan.dropped["/a: model.layers.2.eh_proj.weight"] == "left out, as the layers are cut anew"
    assert plan.warnings == ("model.layers.2.* (2 tensors) are in /a: left out, as the layers are cut anew",)
    assert plan.config["num_nextn_predict_layers"] == 0


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


WEIGHTED = """
merge_method: {method}
base_model: /base
models:
- {{model: /a, parameters: {{weight: {a}}}}}
- {{model: /b, parameters: {{weight: {b}}}}}
parameters: {{{switch}: {on}}}
"""
NORMALIZED = ["linear", "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs", "multislerp"]


def weighted(method: str, a: object, b: object, *, on: bool = True) -> Plan:
    switch = "normalize_weights" if method == "multislerp" else "normalize"
    text = WEIGHTED.format(method=method, a=a, b=b, switch=switch, on=str(on).lower())
    names = ["/base", "/a", "/b"]
    if method == "linear":
        text, names = text.replace("base_model: /base\n", ""), names[1:]
    return plan_of(text, *(llama(name, 3) for name in names))


@pytest.mark.parametrize("method", NORMALIZED)
def test_weights_that_cancel_are_told_with_tensors_models_and_remedy(method: str) -> None:
    with pytest.raises(PlanError) as caught:
        weighted(method, 1, -1)
    switch = "normalize_weights" if method == "multislerp" else "normalize"
    assert str(caught.value) == (
        f"tensor 'model.embed_tokens.weight' and {len(llama_shapes(3)) - 1} more of /a, /b: "
        "the weights [1.0, -1.0] sum to 0 and cannot be normalised\n"
        f"  set `{switch}: false`, or change the models' `weight`"
    )
    assert weighted(method, 1, -1, on=False).shards
    assert weighted(method, 1, -0.5).shards


def test_weights_that_cancel_in_one_layer() -> None:
    names = [name for name in llama_shapes(3) if ".layers.1." in name]
    with pytest.raises(
        PlanError, match=r"^tensor 'model\.layers\.1\.\S+' and \d+ more of /a, /b: .* sum to 0"
    ) as caught:
        weighted("linear", "[1, 0]", "[-2, 1]")  # 1 - 2, 0.5 - 0.5, 0 + 1
    assert f" and {len(names) - 1} more " in str(caught.value)


def test_weights_that_cancel_by_a_filter() -> None:
    with pytest.raises(PlanError, match=r"^tensor 'model\.norm\.weight' of /a, /b: the weights \[1\.0, -1\.0\]"):
        weighted("task_arithmetic", 1, "[{filter: model.norm, value: -1}, {value: 1}]")


def test_a_median_of_points_without_weight() -> None:
    text = "merge_method: geometric_median\nmodels: [{model: /a}, {model: /b}]\nparameters: {weight: 0}\n"
    with pytest.raises(PlanError, match="of /a, /b: all weights are 0"):
        plan_of(text, llama("/a"), llama("/b"))
    assert plan_of(text.replace("weight: 0", "weight: 1"), llama("/a"), llama("/b")).shards


def test_the_weight_of_a_single_direction_is_none() -> None:
    text = "merge_method: multislerp\nmodels: [{model: /a, parameters: {weight: 0}}]\n"
    assert plan_of(text, llama("/a")).shards
