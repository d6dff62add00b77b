"""Checkpoints of codes in a plan: names, specs, expressions, memory, config."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import BlockScaled, Cast, Load, Merge, Mxfp4, loads
from mergekit_ray.core.plan import OutputTensor, Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.quantised import DEQUANTISED_DTYPE, quantisation_of, weights_of
from mergekit_ray.planning.weights import StoredWeights
from mergekit_ray.planning.windows import largest_window, windows
from mergekit_ray.storage.protocols import FileStat
from support.fake_checkpoints import LINEAR, checkpoint, expressions_of, llama, llama_shapes, plan_of

F8, F32, U8 = DType.F8_E4M3, DType.F32, DType.U8
UP, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"num_hidden_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 2]}


def fp8_llama(path: str, settings: dict[str, Any] | None = None, **more: Any) -> Checkpoint:
    """A Llama whose layers' matrices are 8-bit floats in blocks of four rows and two columns."""
    shapes: dict[str, Any] = dict(llama_shapes(1))
    for name in (UP, Q):
        rows, columns = shapes[name]
        shapes[name] = (F8, (rows, columns))
        shapes[f"{name}_scale_inv"] = (F32, (-(-rows // 4), -(-columns // 2)))
    return checkpoint(path, shapes | more, {**CONFIG, "quantization_config": settings or FP8})


def gpt_oss(path: str, num_experts: int = 3, size: int = 64) -> Checkpoint:
    at = "model.layers.0.mlp.experts.down_proj"
    shapes: dict[str, Any] = {
        "model.embed_tokens.weight": (10, size),
        f"{at}_blocks": (U8, (num_experts, size, size // 32, 16)),
        f"{at}_scales": (U8, (num_experts, size, size // 32)),
        f"{at}_bias": (num_experts, size),
        "lm_head.weight": (10, size),
    }
    return checkpoint(path, shapes, {**CONFIG, "quantization_config": {"quant_method": "mxfp4"}})


def test_a_model_of_numbers_is_as_it_is_stored() -> None:
    model = llama("/a", 1)
    weights = weights_of("m0", model, "model /a")
    assert isinstance(weights, StoredWeights)
    assert quantisation_of(model, "model /a") is None


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes"])
def test_what_a_config_says_of_codes_that_are_none_is_left_out(method: str) -> None:
    plain = llama("/a", 1)
    left = checkpoint("/b", llama_shapes(1), {**plain.config, "quantization_config": {"quant_method": method}})
    text = LINEAR.replace("merge_method: linear", "merge_method: linear\nbase_model: /b")
    plan = plan_of(text, plain, left)
    assert "quantization_config" not in plan.config
    [warning] = plan.warnings
    assert warning.startswith(f"model /b: config.json says that its weights are quantised ({method}), but they are not")
    assert expressions_of(plan).keys() == llama_shapes(1).keys()


def test_codes_have_the_names_and_shapes_of_the_numbers() -> None:
    plain, stored = weights_of("m0", llama("/a", 1), "x"), weights_of("m1", fp8_llama("/b"), "x")
    assert dict(stored.specs) == dict(plain.specs)
    assert stored.specs[UP].dtype is DEQUANTISED_DTYPE is DType.BF16
    assert list(stored.inputs) == ["m1"]
    packed = weights_of("m0", gpt_oss("/c", 3, 64), "x")
    name = "model.layers.0.mlp.experts.down_proj"
    assert packed.specs[name] == TensorSpec(name, DType.BF16, (3, 64, 64))
    assert packed.specs.keys() == {"model.embed_tokens.weight", name, f"{name}_bias", "lm_head.weight"}


def test_expressions_read_codes_and_scales_where_they_lie() -> None:
    model = fp8_llama("/a")
    weights = weights_of("m0", model, "x")
    found = weights.expression(UP)
    assert isinstance(found, BlockScaled)
    assert found.block == (4, 2)
    assert [(each.model, each.spec, each.location) for each in loads(found)] == [
        ("m0", *model.tensors[name]) for name in (UP, f"{UP}_scale_inv")
    ]
    norm = weights.expression("model.norm.weight")
    assert isinstance(norm, Load)
    assert norm.location == model.tensors["model.norm.weight"][1]


@pytest.mark.parametrize(
    ("scales", "block", "rows", "kept"),
    [
        ((3, 2), [4, 2], 5, (2, 2)),
        ((3, 2), [4, 2], 8, (2, 2)),
        ((10, 1), None, 7, (7, 1)),
        ((10,), None, 7, (7,)),
        ((1,), None, 7, (1,)),
        ((), None, 7, ()),
        ((1, 4), None, 7, (1, 4)),
    ],
)
def test_fewer_rows_are_fewer_codes_and_their_scales(
    scales: tuple[int, ...], block: list[int] | None, rows: int, kept: tuple[int, ...]
) -> None:
    shapes = {"w.weight": (F8, (10, 4)), "w.weight_scale": (F32, scales)}
    settings = {"quant_method": "fp8", "weight_block_size": block}
    weights = weights_of("m0", checkpoint("/a", shapes, {"quantization_config": settings}), "x")
    found = weights.expression("w.weight", (rows, 4))
    assert isinstance(found, BlockScaled)
    assert found.spec == TensorSpec("w.weight", F32, (rows, 4))
    assert found.scales.spec.shape == kept
    whole = weights.expression("w.weight")
    assert isinstance(whole, BlockScaled)
    for run in ((0, rows * 4), (rows * 4 - 1, rows * 4)):
        assert [n[1:] for n in found.needs(*run)] == [n[1:] for n in whole.needs(*run)]
        assert list(found.needs(*run))[1][2] <= max(1, found.scales.spec.num_elements)


def test_fewer_matrices_of_packed_codes() -> None:
    found = weights_of("m0", gpt_oss("/a", 3), "x").expression("model.layers.0.mlp.experts.down_proj", (2, 64, 64))
    assert isinstance(found, Mxfp4)
    assert found.spec.shape == (2, 64, 64)
    assert found.scales.spec.shape == (2, 64, 2)


def test_codes_merge_with_numbers_and_the_output_has_none() -> None:
    plan = plan_of(LINEAR, fp8_llama("/a"), llama("/b", 1))
    found = expressions_of(plan)
    assert set(found) == set(llama_shapes(1))
    merged = found[UP]
    assert isinstance(merged, Merge)
    assert [type(x) for x in merged.inputs] == [BlockScaled, Load]
    assert merged.spec.dtype is DType.BF16
    assert plan.config == CONFIG
    assert plan.dropped == {}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).digest == plan.digest
    read = sum(
        model.tensors[name][1].num_bytes for model in (fp8_llama("/a"), llama("/b", 1)) for name in model.tensors
    )
    assert plan.read_bytes == read


def test_a_passthrough_dequantises() -> None:
    text = "merge_method: passthrough\nmodels:\n- model: /a\n"
    found = expressions_of(plan_of(text, fp8_llama("/a")))
    assert isinstance(found[UP], Cast)
    assert found[UP].dtype is DType.BF16
    assert isinstance(found["model.norm.weight"], Load)
    wide = plan_of("dtype: float32\n" + text, fp8_llama("/a"))
    assert isinstance(expressions_of(wide)[UP], BlockScaled)
    assert wide.config["torch_dtype"] == "float32"


def test_scales_of_activations_are_named_as_dropped() -> None:
    model = fp8_llama("/a", **{"model.layers.0.mlp.up_proj.input_scale": (F32, ())})
    plan = plan_of(LINEAR, model, llama("/b", 1))
    [(name, reason)] = plan.dropped.items()
    assert name == "/a: model.layers.0.mlp.up_proj.input_scale"
    assert "activations" in reason


def test_files_that_speak_of_codes_do_not_travel() -> None:
    side = [FileStat(name, 9, "9-1") for name in ("hf_quant_config.json", "tokenizer.json", "quantize_config.json")]
    donor = fp8_llama("/a")
    with_files = Checkpoint(donor.source, "/a", donor.files, donor.tensors, donor.config, side)
    assert [s.file.name for s in plan_of(LINEAR, with_files, llama("/b", 1)).side_files] == ["tokenizer.json"]


def test_models_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ModelError, match=r"quantised \(gptq\)") as caught:
        plan_of(LINEAR, llama("/a", 1), fp8_llama("/b", {"quant_method": "gptq"}))
    assert caught.value.where == "model /b"


@pytest.mark.parametrize("method", ["linear", "passthrough"])
@pytest.mark.parametrize(("num_experts", "size"), [(40, 1440), (8, 2880), (100, 320)])
def test_no_window_of_packed_codes_takes_more_than_was_projected(method: str, num_experts: int, size: int) -> None:
    models = [gpt_oss(path, num_experts, size) for path in ("/a", "/b")][: 2 if method == "linear" else 1]
    text = LINEAR if method == "linear" else "merge_method: passthrough\nmodels:\n- model: /a\n"
    name = "model.layers.0.mlp.experts.down_proj"
    expression = expressions_of(plan_of(text, *models))[name]
    tensor = OutputTensor(expression.spec, expression, 0, expression.spec.num_bytes)
    found = list(windows(tensor))
    largest = largest_window([tensor])
    assert largest is not None
    assert max(window.read_bytes + window.write_bytes for window in found) <= largest.memory_bytes
    # Windows are whole matrices, so that nothing is read twice.
    assert sum(window.read_bytes for window in found) == sum(load.spec.num_bytes for load in loads(expression))
