"""Adapters on bases, by headers alone: which tensor becomes what, what is read, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import Adapter, adapted
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Expression, Load, LowRank, Merge, from_json, loads, to_json
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.make import check_plannable, make_plan
from mergekit_ray.planning.weights import StoredWeights
from mergekit_ray.storage.protocols import FileStat
from support.adapter_headers import adapter_of
from support.fake_checkpoints import checkpoint, expressions_of, llama, recipe_of

# Of `llama`: vocabulary 10, hidden 4, inner 6.
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PASSTHROUGH = "merge_method: passthrough\nmodels:\n- {model: /base+/adapter}\n"


def pair(module: str, outputs: int, inputs: int, rank: int = 2) -> dict[str, tuple[int, int]]:
    return {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}


def embedding_pair(module: str, rows: int, width: int, rank: int = 2) -> dict[str, tuple[int, int]]:
    return {f"{module}.lora_embedding_A": (rank, rows), f"{module}.lora_embedding_B": (width, rank)}


def view(base: Checkpoint, adapter: Adapter, **options: Any) -> LoraWeights:
    return LoraWeights(StoredWeights("m0", base), base.config, "a0", adapter, **options)


def plan_of(text: str, models: Mapping[str, Checkpoint]) -> Plan:
    return make_plan(recipe_of(text), {ModelReference.parse(name): model for name, model in models.items()})


def read(expression: Expression) -> list[str]:
    return [f"{x.model}: {x.spec.name.removeprefix('base_model.model.')}" for x in loads(expression)]


# -- what becomes of what ----------------------------------------------------------------------------------------------


def test_a_product_is_added_to_its_tensor_and_to_no_other() -> None:
    base = llama("/base")
    found = view(base, adapter_of(pair(Q, 4, 4)))
    expression = found.expression(f"{Q}.weight")
    assert isinstance(expression, LowRank)
    assert (expression.scale, expression.transposed, expression.dtype) == (3.0, False, DType.F32)
    assert read(expression) == [f"m0: {Q}.weight", f"a0: {Q}.lora_A.weight", f"a0: {Q}.lora_B.weight"]
    assert found.specs == {name: spec for name, (spec, _) in base.tensors.items()}
    assert isinstance(found.expression(f"{UP}.weight"), Load)
    assert list(found.inputs) == ["m0", "a0"]
    assert found.config is base.config


def test_rank_and_scale_come_from_patterns() -> None:
    shapes = {**pair(Q, 4, 4, rank=3), **pair(UP, 6, 4)}
    found = view(llama("/base"), adapter_of(shapes, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 1}))
    scales = [found.expression(f"{name}.weight") for name in (Q, UP)]
    assert [x.scale for x in scales if isinstance(x, LowRank)] == [2.0, 0.5]


@pytest.mark.parametrize(("dtype", "wide"), [(DType.BF16, True), (DType.F64, False)])
def test_float64_where_the_recipe_or_the_base_is(dtype: DType, wide: bool) -> None:
    found = view(llama("/base", dtype=dtype), adapter_of(pair(Q, 4, 4)), wide=wide)
    assert found.expression(f"{Q}.weight").spec.dtype is DType.F64


def test_an_embedding_is_transposed() -> None:
    found = view(llama("/base"), adapter_of(embedding_pair("model.embed_tokens", 10, 4)))
    expression = found.expression(EMBEDDING)
    assert isinstance(expression, LowRank)
    assert expression.transposed
    cut = found.expression(EMBEDDING, (7, 4))
    assert isinstance(cut, LowRank)
    assert (cut.x.spec.shape, cut.a.spec.shape, cut.b.spec.shape) == ((7, 4), (2, 10), (4, 2))


def test_fewer_rows_read_fewer_rows_of_the_factor() -> None:
    found = view(
        llama("/base"), adapter_of({**pair("lm_head", 10, 4), "lm_head.lora_magnitude_vector": (10,)}, use_dora=True)
    )
    cut = found.expression(HEAD, (7, 4))
    assert isinstance(cut, LowRank)
    assert cut.magnitude is not None
    assert [x.spec.shape for x in (cut.x, cut.a, cut.b, cut.magnitude)] == [(7, 4), (2, 4), (7, 2), (7,)]
    assert [x.location.num_bytes for x in loads(cut)][2] == 4 * 7 * 2


GPT2 = {
    "transformer.wte.weight": (10, 4),
    "transformer.h.0.attn.c_attn.weight": (4, 12),
    "transformer.h.0.attn.c_proj.weight": (4, 4),
}


@pytest.mark.parametrize("flag", [False, True])
def test_gpt2_keeps_matrices_as_inputs_by_outputs_whatever_the_flag_says(flag: bool) -> None:
    base = checkpoint("/base", GPT2, {"model_type": "gpt2", "n_layer": 1})
    shapes = {**pair("transformer.h.0.attn.c_attn", 12, 4), **pair("transformer.h.0.attn.c_proj", 4, 4)}
    found = view(base, adapter_of(shapes, fan_in_fan_out=flag))
    for name in ("c_attn", "c_proj"):
        expression = found.expression(f"transformer.h.0.attn.{name}.weight")
        assert isinstance(expression, LowRank)
        assert expression.transposed


@pytest.mark.parametrize("flag", [False, True])
def test_of_an_unknown_model_the_flag_decides_what_a_square_matrix_does_not_tell(flag: bool) -> None:
    base = checkpoint("/base", {"h.0.a.weight": (4, 4), "h.0.b.weight": (4, 6)}, {"model_type": "new"})
    found = view(base, adapter_of({**pair("h.0.a", 4, 4), **pair("h.0.b", 4, 6)}, fan_in_fan_out=flag))
    expressions = [found.expression(f"h.0.{name}.weight") for name in "ab"]
    assert [x.transposed for x in expressions if isinstance(x, LowRank)] == [flag, False]


def test_whole_tensors_take_the_place_of_the_bases_in_its_dtype() -> None:
    found = view(llama("/base"), adapter_of({"model.norm.weight": (4,), **pair(Q, 4, 4)}, modules_to_save=["norm"]))
    expression = found.expression("model.norm.weight")
    assert read(expression) == ["a0: model.norm.weight"]
    assert found.specs["model.norm.weight"].dtype is DType.BF16
    assert expression.spec.dtype is DType.F32


def test_a_bias_of_a_factor_is_scaled_and_added() -> None:
    base = checkpoint("/base", {"l.0.a.weight": (6, 4), "l.0.a.bias": (6,)}, {})
    found = view(base, adapter_of({**pair("l.0.a", 6, 4), "l.0.a.lora_B.bias": (6,)}, lora_bias=True))
    expression = found.expression("l.0.a.bias")
    assert isinstance(expression, Merge)
    assert (expression.method, expression.parameters["normalize"]) == ("linear", False)
    assert [x["weight"] for x in expression.input_parameters] == [1.0, 3.0]
    assert read(expression) == ["m0: l.0.a.bias", "a0: l.0.a.lora_B.bias"]


def test_a_bias_of_a_factor_needs_one_to_be_added_to() -> None:
    adapter = adapter_of({**pair("l.0.a", 6, 4), "l.0.a.lora_B.bias": (6,)}, lora_bias=True)
    with pytest.raises(ModelError, match=r"'l\.0\.a' of the base has no bias to add it to") as caught:
        view(checkpoint("/base", {"l.0.a.weight": (6, 4)}, {}), adapter)
    assert "PEFT cannot merge it either" in str(caught.value.remedy)


def test_what_is_stored_beside_the_factors_of_a_layer_replaces_its_matrix() -> None:
    shapes = {**embedding_pair("model.embed_tokens", 10, 4), "model.embed_tokens.base_layer.weight": (10, 4)}
    expression = view(llama("/base"), adapter_of(shapes)).expression(EMBEDDING)
    assert isinstance(expression, LowRank)
    assert read(expression.x) == ["a0: model.embed_tokens.base_layer.weight"]


@pytest.mark.parametrize(("stored", "named"), [("transformer.h.0.a", "h.0.a"), ("h.0.a", "transformer.h.0.a")])
def test_names_may_differ_by_their_first_component(stored: str, named: str) -> None:
    found = view(checkpoint("/base", {f"{stored}.weight": (4, 6)}, {}), adapter_of(pair(named, 4, 6)))
    assert isinstance(found.expression(f"{stored}.weight"), LowRank)


def test_a_name_that_may_mean_two_tensors_is_refused() -> None:
    base = checkpoint("/base", {f"{wrapper}.layers.0.a.weight": (4, 6) for wrapper in ("model", "language_model")})
    with pytest.raises(ModelError) as caught:
        view(base, adapter_of(pair("transformer.layers.0.a", 4, 6)))
    assert "which in the base is 'language_model.layers.0.a.weight' or 'model.layers.0.a.weight'" in caught.value.what
    assert isinstance(
        view(base, adapter_of(pair("model.layers.0.a", 4, 6))).expression("model.layers.0.a.weight"), LowRank
    )


# -- tied embeddings ---------------------------------------------------------------------------------------------------


BOTH = {**embedding_pair("model.embed_tokens", 10, 4), **pair("lm_head", 10, 4)}


@pytest.mark.parametrize(
    ("shapes", "num_products"),
    [(embedding_pair("model.embed_tokens", 10, 4), 1), (pair("lm_head", 10, 4), 1), (BOTH, 2)],
)
def test_tied_weights_are_one_tensor_to_which_everything_is_added(shapes: dict[str, Any], num_products: int) -> None:
    found = view(llama("/base", tied=True), adapter_of(shapes))
    expression = found.expression(EMBEDDING)
    for _ in range(num_products):
        assert isinstance(expression, LowRank)
        expression = expression.x
    assert isinstance(expression, Load)
    assert HEAD not in found.specs
    assert found.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("saved", "shapes", "embedding", "head"),
    [
        (["embed_tokens"], {EMBEDDING: (10, 4)}, "a0", "m0"),
        (["lm_head"], {HEAD: (10, 4)}, "m0", "a0"),
        (["embed_tokens", "lm_head"], {EMBEDDING: (10, 4), HEAD: (10, 4)}, "a0", "a0"),
        (["embed_tokens"], {EMBEDDING: (10, 4), **pair("lm_head", 10, 4)}, "a0", "m0 a0 a0"),
        (["lm_head"], {HEAD: (10, 4), **embedding_pair("model.embed_tokens", 10, 4)}, "m0 a0 a0", "a0"),
    ],
)
@pytest.mark.parametrize("redundant", [False, True])
def test_a_side_that_is_stored_whole_unties(
    saved: list[str], shapes: dict[str, Any], embedding: str, head: str, redundant: bool
) -> None:
    base = llama("/base", tied=True)
    if redundant:
        both = {name: (spec.dtype, spec.shape) for name, (spec, _) in base.tensors.items()}
        base = checkpoint("/base", {**both, HEAD: (10, 4)}, base.config)
    found = view(base, adapter_of(shapes, modules_to_save=saved))
    assert found.config["tie_word_embeddings"] is False
    assert base.config["tie_word_embeddings"] is True
    assert found.specs[HEAD].shape == (10, 4)
    assert " ".join(x.model for x in loads(found.expression(EMBEDDING))) == embedding
    assert " ".join(x.model for x in loads(found.expression(HEAD))) == head
    # A copy of the embedding that the base's file holds as head has no effect.
    assert all(x.spec.name != HEAD for x in loads(found.expression(HEAD)) if x.model == "m0")


def test_no_head_is_made_up_where_its_name_is_not_known() -> None:
    base = llama("/base", tied=True)
    base.config["architectures"] = ["SomeForMaskedLM"]
    with pytest.raises(ModelError, match="nothing tells what the class calls a separate head") as caught:
        view(base, adapter_of({EMBEDDING: (10, 4)}, modules_to_save=["embed_tokens"]))
    assert "merge_and_unload" in str(caught.value.remedy)


def test_a_tie_that_was_kept_in_training_stays() -> None:
    shapes = {EMBEDDING: (10, 4), HEAD: (10, 4)}
    found = view(
        llama("/base", tied=True), adapter_of(shapes, modules_to_save=["model.embed_tokens"], ensure_weight_tying=True)
    )
    assert found.config["tie_word_embeddings"] is True
    assert HEAD not in found.specs
    assert [x.model for x in loads(found.expression(EMBEDDING))] == ["a0"]


def test_resized_embeddings_resize_the_model() -> None:
    found = view(llama("/base"), adapter_of({EMBEDDING: (12, 4), HEAD: (12, 4), **pair(Q, 4, 4)}))
    assert found.specs[EMBEDDING].shape == found.specs[HEAD].shape == (12, 4)
    assert found.config["vocab_size"] == 12
    tied = view(llama("/base", tied=True), adapter_of({EMBEDDING: (12, 4)}))
    assert (tied.specs[EMBEDDING].shape, tied.config["vocab_size"]) == ((12, 4), 12)


@pytest.mark.parametrize(("tied", "saved", "name"), [(False, [], EMBEDDING), (True, ["lm_head"], HEAD)])
def test_a_vocabulary_resized_in_part_is_refused(tied: bool, saved: list[str], name: str) -> None:
    with pytest.raises(ModelError, match=r"resizes only a part of the vocabulary \(.* 12.* rows\)"):
        view(llama("/base", tied=tied), adapter_of({name: (12, 4)}, modules_to_save=saved))


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (pair("model.layers.7.self_attn.q_proj", 4, 4), "layers.7.self_attn.q_proj.lora_A.weight' belongs to"),
        (
            {"score.weight": (2, 4)},
            "'base_model.model.score.weight' belongs to 'score.weight', which the base does not",
        ),
        ({f"{Q}.lora_B.weight": (4, 2)}, "lora_A of 'model.layers.0.self_attn.q_proj' is missing"),
        ({f"{Q}.lora_A.weight": (2, 4)}, "lora_B of 'model.layers.0.self_attn.q_proj' is missing"),
        ({"model.embed_tokens.lora_embedding_A": (2, 10)}, "lora_embedding_B of 'model.embed_tokens' is missing"),
        (
            pair(UP, 6, 5),
            r"lora_A.weight' \[2, 5\] .* do not fit .*\[6, 4\] with rank 2: expected \[2, 4\] and \[6, 2\]",
        ),
        (pair(UP, 6, 4, rank=3), r"with rank 2: expected \[2, 4\] and \[6, 2\]"),
        ({f"{UP}.lora_A.weight": (2, 4), f"{UP}.lora_B.weight": (6, 3)}, r"expected \[2, 4\] and \[6, 2\]"),
        (embedding_pair("model.embed_tokens", 11, 4), r"expected \[2, 10\] and \[4, 2\]"),
        (pair("model.norm", 4, 4), r"which is no matrix of weights: BF16 \[4\]"),
        ({"model.norm.weight": (5,)}, r"has shape \[5\], the base's 'model.norm.weight' \[4\]"),
        ({EMBEDDING: (12, 5)}, r"has shape \[12, 5\]"),
        ({**pair(Q, 4, 4), f"{Q}.lora_B.bias": (4,)}, "lora_B.bias' is the bias of a factor"),
        (
            {**pair(Q, 4, 4), f"{Q}.lora_magnitude_vector": (4,)},
            "lora_magnitude_vector' is there, and use_dora is false",
        ),
    ],
)
def test_what_does_not_fit_is_named(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        view(llama("/base"), adapter_of(shapes))
    assert caught.value.where == "adapter /adapter"
    assert caught.value.remedy


@pytest.mark.parametrize("leaf", ["weight", "out_proj.bias"])
def test_the_head_of_another_class_is_merged_by_peft(leaf: str) -> None:
    shapes = {**pair(Q, 4, 4), f"classifier.{leaf}": (3, 4)}
    with pytest.raises(ModelError, match=rf"stores 'classifier' whole .*model.classifier.{leaf}'") as caught:
        view(llama("/base"), adapter_of(shapes, task_type="SEQ_CLS", modules_to_save=["classifier", "score"]))
    assert "merge_and_unload" in str(caught.value.remedy)
    with pytest.raises(ModelError, match=r"belongs to 'model.norm.scale', which the base does not have"):
        view(llama("/base"), adapter_of({"model.norm.scale": (4,)}, modules_to_save=["norm"]))


def test_magnitudes_that_are_missing_or_of_another_length() -> None:
    with pytest.raises(ModelError, match=r"lora_A\.weight' has no magnitude, and use_dora is true"):
        view(llama("/base"), adapter_of(pair(Q, 4, 4), use_dora=True))
    shapes = {**pair(UP, 6, 4), f"{UP}.lora_magnitude_vector": (4,)}
    with pytest.raises(ModelError, match=r"has shape \[4\], expected \[6\]"):
        view(llama("/base"), adapter_of(shapes, use_dora=True))


def test_codes_are_no_weights() -> None:
    base = checkpoint("/base", {"l.0.a.weight": (DType.U8, (6, 4))}, {})
    with pytest.raises(ModelError, match=r"no matrix of weights: U8 \[6, 4\]"):
        view(base, adapter_of(pair("l.0.a", 6, 4)))
    with pytest.raises(ModelError, match="is not floating point"):
        view(llama("/base"), adapter_of(pair(Q, 4, 4), dtype=DType.I8))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_passthrough_rounds_once_to_the_bases_dtype() -> None:
    base, adapter = llama("/base"), adapter_of(pair(Q, 4, 4))
    plan = plan_of(PASSTHROUGH, {"/base+/adapter": adapted(base, adapter)})
    expressions = expressions_of(plan)
    assert expressions.keys() == base.tensors.keys()
    assert isinstance(expressions[f"{Q}.weight"], Cast)
    assert isinstance(expressions[f"{Q}.weight"].x, LowRank)
    assert all(isinstance(x, Load) for name, x in expressions.items() if name != f"{Q}.weight")
    assert {(t.spec.dtype) for shard in plan.shards for t in shard.tensors} == {DType.BF16}
    for expression in expressions.values():
        assert from_json(to_json(expression)) == expression


def test_inputs_are_pinned_each_under_its_own_name() -> None:
    adapter = adapter_of(pair(Q, 4, 4))
    plan = plan_of(PASSTHROUGH, {"/base+/adapter": adapted(llama("/base"), adapter)})
    assert {key: (model.reference, model.uri) for key, model in plan.inputs.items()} == {
        "m0": ("/base", "/base"),
        "a0": ("/adapter", "/adapter"),
    }
    [file] = plan.inputs["a0"].files.values()
    stat = adapter.checkpoint.files["adapter_model.safetensors"]
    assert (file.name, file.num_bytes, file.version) == (stat.name, stat.num_bytes, stat.version)


def test_many_adapters_on_one_base_read_it_once() -> None:
    base = llama("/base")
    names = [f"/adapter{i}" for i in range(3)]
    models: dict[str, Checkpoint] = {"/base": base}
    for name in names:
        models[f"/base+{name}"] = adapted(base, adapter_of({**pair(Q, 4, 4), **pair(UP, 6, 4)}, path=name))
    listed = "".join(f"- {{model: {name}, parameters: {{weight: 0.3}}}}\n" for name in list(models)[1:])
    plan = plan_of(f"merge_method: task_arithmetic\nbase_model: /base\nmodels:\n{listed}", models)
    assert list(plan.inputs) == ["m0", "a0", "a1", "a2"]
    assert [plan.inputs[f"a{i}"].reference for i in range(3)] == names
    for expression in expressions_of(plan).values():
        assert [x.model for x in loads(expression)].count("m0") == 1
    factor_bytes = 4 * 2 * (4 + 4 + 6 + 4)
    assert plan.read_bytes == sum(spec.num_bytes for spec, _ in base.tensors.values()) + 3 * factor_bytes
    # The adapters differ in nothing but their tensors: the merge names each model's randomness by its full reference.
    merge = expressions_of(plan)[f"{Q}.weight"]
    assert len(set(merge.keys)) == 3


def test_the_donor_may_be_an_adapted_model() -> None:
    base = replace(llama("/base"), side_files=[FileStat("tokenizer.json", 9, "9-1")])
    plan = plan_of(PASSTHROUGH, {"/base+/adapter": adapted(base, adapter_of(pair(Q, 4, 4)))})
    assert [side.model for side in plan.side_files] == ["m0"]
    assert plan.inputs["m0"].uri == "/base"


def test_an_untied_model_makes_an_untied_output() -> None:
    adapter = adapter_of({HEAD: (10, 4)}, modules_to_save=["lm_head"])
    plan = plan_of(PASSTHROUGH, {"/base+/adapter": adapted(llama("/base", tied=True), adapter)})
    assert plan.config["tie_word_embeddings"] is False
    assert HEAD in expressions_of(plan)


def test_compute_in_float64_applies_in_float64() -> None:
    models = {"/base+/adapter": adapted(llama("/base"), adapter_of(pair(Q, 4, 4)))}
    plan = plan_of("compute_dtype: float64\n" + PASSTHROUGH, models)
    assert expressions_of(plan)[f"{Q}.weight"].x.dtype is DType.F64


def test_routers_are_not_made_from_an_adapted_base() -> None:
    text = "base_model: /base+/adapter\ngate_mode: {}\nexperts:\n- {{source_model: /b, positive_prompts: [x]}}\n"
    with pytest.raises(PlanError, match="without its adapter"):
        check_plannable(load_recipe(text.format("hidden")))
    assert check_plannable(load_recipe(text.format("random")))
