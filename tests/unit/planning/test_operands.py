"""Which tensors may be merged: tied heads, vocabularies, shapes, missing tensors, dtypes that are no weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Load
from support.fake_checkpoints import LINEAR, checkpoint, expressions_of, llama, llama_shapes, plan_of, sources


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
    assert lines == ["  model.layers.*.mlp.up_proj.weight (2 tensors): different shapes (/a: [6, 4], /b: [8, 4])"]
    other = llama_shapes(2)
    other |= {"model.layers.1.mlp.up_proj.weight": (9, 4), "model.norm.weight": (5,)}
    with pytest.raises(ModelError) as caught:
        plan_of(LINEAR, llama("/a"), checkpoint("/b", other, llama("/b").config))
    assert caught.value.what.splitlines()[1:] == [
        "  model.layers.1.mlp.up_proj.weight: different shapes (/a: [6, 4], /b: [9, 4])",
        "  model.norm.weight: different shapes (/a: [4], /b: [5])",
    ]


def test_classes_that_differ_are_named() -> None:
    """Beside the tensors: most who meet this have mixed two architectures."""
    classes = {"/a": "LlamaForCausalLM", "/b": "Qwen2ForCausalLM", "/c": "LlamaForCausalLM"}
    models = [
        replace(llama(path, inner=8 if path == "/b" else 6), config={"architectures": [name], "num_hidden_layers": 2})
        for path, name in classes.items()
    ]
    weight = "parameters: {weight: 1}"
    recipe = f"merge_method: linear\nmodels: [{', '.join(f'{{model: {path}, {weight}}}' for path in classes)}]\n"
    with pytest.raises(ModelError) as caught:
        plan_of(recipe, *models)
    assert caught.value.what.splitlines()[0] == (
        "the models do not fit together: LlamaForCausalLM (/a, /c) against Qwen2ForCausalLM (/b):"
    )
    alike = [replace(model, config={**model.config, "architectures": ["LlamaForCausalLM"]}) for model in models]
    with pytest.raises(ModelError) as caught:
        plan_of(recipe, *alike)
    assert caught.value.what.splitlines()[0] == "the models do not fit together:"


def test_a_long_list_of_mismatches_is_counted() -> None:
    def one(path: str, inner: int) -> Checkpoint:
        shapes = llama_shapes(1) | {f"model.layers.0.{letter}.weight": (inner, 4) for letter in "abcdefghijklmnopqrst"}
        return checkpoint(path, shapes, {"num_hidden_layers": 1, "tie_word_embeddings": False})

    with pytest.raises(ModelError, match=r"\.\.\. and 8 more"):
        plan_of(LINEAR, one("/a", 6), one("/b", 8))


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
    with pytest.raises(ModelError, match=r"visual\.\* \(2 tensors\): in /b, not in /a"):
        plan_of("missing: error\n" + LINEAR, llama("/a", 1), checkpoint("/b", deeper, config))


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


def test_codes_of_8_bit_floats_without_scales_are_refused() -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    shapes = llama_shapes(1) | {"model.layers.0.mlp.up_proj.weight": (DType.F8_E4M3, (6, 4))}
    with pytest.raises(ModelError, match=r"up_proj\.weight: stored as 8-bit floats \(F8_E4M3\) without scales"):
        plan_of(LINEAR, llama("/a", 1), checkpoint("/b", shapes, config))


def test_quantised_models_are_refused_by_name() -> None:
    shapes = llama_shapes(1) | {"model.layers.0.mlp.up_proj.weight": (DType.I32, (6, 4))}
    quantised = checkpoint("/b", shapes, {"num_hidden_layers": 1, "quantization_config": {"quant_method": "awq"}})
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
