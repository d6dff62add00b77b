"""Which tensors are codes, by names, dtypes, shapes and config; and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mergekit_ray.architectures.quantisation import PackedFp4, Quantisation, ScaledFp8, quantisation
from mergekit_ray.architectures.quantisation_config import without_quantisation
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from support.fake_checkpoints import specs_of

F8, F32, BF16, U8 = DType.F8_E4M3, DType.F32, DType.BF16, DType.U8
W = "model.layers.0.mlp.up_proj.weight"
NORM = {"model.layers.0.input_layernorm.weight": (4,), "model.layers.0.attn.bias": (DType.BOOL, (1, 1, 8, 8))}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def read(tensors: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Quantisation | None:
    config = {} if settings is None else {"quantization_config": settings}
    return quantisation(specs_of({**NORM, **tensors}), config, "model x")


def compressed(**weights: Any) -> dict[str, Any]:
    """A config as compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


PER_TENSOR_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
CODES = {W: (DType.U8, (4, 4))}

LAYOUTS: dict[str, tuple[dict[str, Any] | None, tuple[int, ...], str, tuple[int, ...], tuple[int, ...]]] = {
    # name: config, shape of the codes, ending of the scales, their shape, block
    "DeepSeek-V3": (FP8, (576, 7168), "_scale_inv", (5, 56), (128, 128)),
    "Qwen3-FP8, smaller than a block": (FP8, (100, 60), "_scale_inv", (1, 1), (100, 60)),
    "other blocks": ({**FP8, "weight_block_size": [64, 32]}, (100, 60), "_scale_inv", (2, 2), (64, 32)),
    "a config without blocks": ({"quant_method": "fp8"}, (576, 7168), "_scale_inv", (5, 56), (128, 128)),
    "no config": (None, (576, 7168), "_scale_inv", (5, 56), (128, 128)),
    "experts in one tensor": (FP8, (8, 256, 384), "_scale_inv", (8, 2, 3), (1, 128, 128)),
    "Ministral": (PER_TENSOR_FP8, (100, 60), "_scale_inv", (), (100, 60)),
    "AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, (100, 60), "_scale", (1,), (100, 60)),
    "compressed-tensors, tensor": (compressed(strategy="tensor"), (100, 60), "_scale", (1,), (100, 60)),
    "compressed-tensors, channel": (compressed(strategy="channel"), (100, 60), "_scale", (100, 1), (1, 60)),
    "compressed-tensors, block": (
        compressed(strategy="block", block_structure=[128, 128]),
        (576, 7168),
        "_scale",
        (5, 56),
        (128, 128),
    ),
    "compressed-tensors, block as text": (
        compressed(strategy="block", block_structure="64x32"),
        (100, 60),
        "_scale",
        (2, 2),
        (64, 32),
    ),
    "compressed-tensors, group": (compressed(strategy="group", group_size=32), (100, 60), "_scale", (100, 2), (1, 32)),
    "Llama-3.1-405B-FP8": (FBGEMM, (100, 60), "_scale", (100, 1), (1, 60)),
    "Llama-4, experts in one tensor": (FBGEMM, (8, 100, 60), "_scale", (8, 1, 60), (1, 100, 1)),
    "modelopt, tensor": (MODELOPT, (100, 60), "_scale", (), (100, 60)),
    "modelopt, row": (
        {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        (100, 60),
        "_scale",
        (100,),
        (1, 60),
    ),
    "modelopt, block": ({**MODELOPT, "quant_algo": "fp8_pb_wo"}, (576, 7168), "_scale", (5, 56), (128, 128)),
    "rows without a second dimension": (FBGEMM, (100, 60), "_scale", (100,), (1, 60)),
    "a scale per expert": (PER_TENSOR_FP8, (8, 100, 60), "_scale", (8, 1, 1), (1, 100, 60)),
    "nobody's method, scales per row": (None, (100, 60), "_scale", (100, 1), (1, 60)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [F8, DType.F8_E5M2])
def test_layouts_of_fp8(name: str, dtype: DType) -> None:
    settings, codes, ending, scales, block = LAYOUTS[name]
    found = read({W: (dtype, codes), W + ending: (F32, scales)}, settings)
    assert found == Quantisation({W: ScaledFp8(W, W + ending, block)}, {})


@pytest.mark.parametrize("settings", [None, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}])
def test_gpt_oss(settings: dict[str, Any] | None) -> None:
    at = "model.layers.0.mlp.experts"
    tensors = {
        f"{at}.gate_up_proj_blocks": (U8, (4, 128, 2, 16)),
        f"{at}.gate_up_proj_scales": (U8, (4, 128, 2)),
        f"{at}.gate_up_proj_bias": (4, 128),
    }
    packed = PackedFp4(f"{at}.gate_up_proj_blocks", f"{at}.gate_up_proj_scales")
    assert read(tensors, settings) == Quantisation({f"{at}.gate_up_proj": packed}, {})


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"vision": {"a": 1}}]
)
def test_numbers_are_no_codes(config: dict[str, Any]) -> None:
    assert quantisation(specs_of({**NORM, W: (4, 4), "logit_scale": ()}), config, "model x") is None


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (FP8, "fp8"),
        (MODELOPT, "modelopt"),
        ({**MODELOPT, "quant_algo": None, "kv_cache_quant_algo": "FP8"}, "modelopt"),
        ({**MODELOPT, "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        (compressed(num_bits=4), "compressed-tensors"),
        ({"bits": 3}, "unknown method"),
    ],
)
def test_a_config_that_speaks_of_codes_that_are_none(settings: dict[str, Any], method: str) -> None:
    """As it is left over where a dequantised model, or one tuned on top of codes, is saved."""
    at = W.removesuffix(".weight")
    numbers = {W: (4, 4), "ids": (DType.I64, (4,)), "clip.position_ids": (DType.I64, (1, 8)), "a.temperature": ()}
    assert read(numbers, settings) == Quantisation({}, {}, (method,))
    found = read({**numbers, f"{at}.input_scale": (F32, ())}, settings)
    assert found is not None
    assert list(found.dropped) == [f"{at}.input_scale"]


def test_what_modelopt_stores_of_activations_and_the_cache_is_dropped() -> None:
    at = "model.layers.0.self_attn"
    scales = {
        f"{at}.k_proj.k_scale": (F32, ()),
        f"{at}.v_proj.v_scale": (F32, ()),
        f"{at}.o_proj.input_scale": (F32, ()),
    }
    name = f"{at}.o_proj.weight"
    found = read({name: (F8, (8, 8)), f"{name}_scale": (F32, ()), **scales}, MODELOPT)
    assert found == Quantisation({name: ScaledFp8(name, f"{name}_scale", (8, 8))}, found.dropped if found else {})
    assert found.dropped.keys() == scales.keys()


@pytest.mark.parametrize("part", ["text_config", "thinker_config"])
def test_configs_of_modalities_are_read(part: str) -> None:
    specs = specs_of({W: (F8, (100, 60)), f"{W}_scale_inv": (F32, (4, 2))})
    inner = {"quantization_config": {**FP8, "weight_block_size": [32, 32]}}
    config = {part: inner if part == "text_config" else {"text_config": inner}}
    found = quantisation(specs, config, "model x")
    assert found is not None
    assert found.weights == {W: ScaledFp8(W, f"{W}_scale_inv", (32, 32))}


def test_what_belongs_to_activations_is_dropped_with_its_reason() -> None:
    at = W.removesuffix(".weight")
    dropped = {
        f"{at}.input_scale": (F32, ()),
        f"{at}.activation_scale": (F32, ()),
        f"{at}.input_scale_ub": (F32, (1,)),
        "model.layers.0.self_attn.k_scale": (F32, ()),
        "model.layers.0.self_attn.v_proj.output_scale": (F32, (1,)),
        "model.layers.0.mlp.experts.gate_up_proj_input_scale": (F32, (8,)),
    }
    kept = {"model.layers.0.attn.v_scale": (F32, (64,)), "vision.layer_scale": (F32, (4,))}
    found = read({W: (F8, (8, 8)), f"{W}_scale": (F32, ()), **dropped, **kept}, PER_TENSOR_FP8)
    assert found is not None
    assert list(found.weights) == [W]
    assert found.dropped.keys() == dropped.keys()
    assert {reason.split(":")[0] for reason in found.dropped.values()} == {
        "a scale of activations",
        "a scale of the key-value cache",
    }


REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "GPTQ": ({"quant_method": "gptq"}, CODES, "quantised (gptq)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, CODES, "quantised (bitsandbytes)"),
    "bitsandbytes, old": ({"load_in_8bit": True}, CODES, "quantised (bitsandbytes)"),
    "no method": ({"bits": 3}, CODES, "quantised (unknown method)"),
    "8-bit floats of no known method": ({"quant_method": "quark"}, {W: (F8, (4, 4))}, "quantised (quark)"),
    "rounded as they are used": ({"quant_method": "bitnet", "quantization_mode": "online"}, {}, "quantised (bitnet)"),
    "modelopt, NVFP4": ({**MODELOPT, "quant_algo": "NVFP4"}, CODES, "quantised (modelopt, NVFP4)"),
    "modelopt, mixed": ({**MODELOPT, "quant_algo": "MIXED_PRECISION"}, CODES, "quantised (modelopt, MIXED_PRECISION)"),
    "modelopt, MXFP8": (
        {**MODELOPT, "quant_algo": "MXFP8"},
        {W: (F8, (4, 64)), f"{W}_scale": (U8, (4, 2))},
        "quantised (modelopt, MXFP8)",
    ),
    "modelopt, AWQ by name": (
        MODELOPT,
        {W: (F8, (4, 4)), f"{W}_scale": (F32, ()), "model.layers.0.mlp.up_proj.pre_quant_scale": (F32, (4,))},
        "(modelopt, AWQ)",
    ),
    "int8": (compressed(type="int"), CODES, "quantised (compressed-tensors, int of 8 bits)"),
    "nvfp4": (compressed(num_bits=4), CODES, "quantised (compressed-tensors, float of 4 bits)"),
    "not symmetric": (compressed(symmetric=False), CODES, "float of 8 bits, not symmetric"),
    "rotated": ({**compressed(), "transform_config": {"config_groups": {"u": {}}}}, {}, "compressed-tensors, rotated"),
    "sparse": ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse-24-bitmask"),
    "a preset": ({"quant_method": "compressed-tensors", "config_groups": {"FP8": ["Linear"]}}, CODES, "unknown type"),
    "fp4 experts": ({**FP8, "expert_dtype": "fp4"}, CODES, "quantised (fp8 with experts in fp4)"),
    "blocks of three": ({**FP8, "weight_block_size": [1, 2, 3]}, CODES, "gives blocks of [1, 2, 3]"),
    "blocks of nothing": ({**FP8, "weight_block_size": [0, 128]}, CODES, "gives blocks of [0, 128]"),
    "GPTQ by name": (None, {"a.qweight": (DType.I32, (4, 4)), "a.qzeros": (DType.I32, (1, 4))}, "(GPTQ or AWQ)"),
    "bitsandbytes by name": (None, {W: (U8, (8, 1)), f"{W}.absmax": (F32, (1,))}, "(bitsandbytes, 4 bits)"),
    "8 bits by name": (None, {W: (DType.I8, (4, 4)), "model.layers.0.mlp.up_proj.SCB": (F32, (4,))}, "8 bits)"),
    "HQQ by name": (None, {"a.W_q": (U8, (4, 4))}, "(HQQ)"),
    "quanto by name": (None, {"a.weight._data": (DType.I8, (4, 4)), "a.weight._scale": (4, 1)}, "(quanto)"),
    "packed by name": (None, {"a.weight_packed": (DType.I32, (4, 4))}, "(compressed-tensors, packed)"),
    "nvfp4 by name": (
        None,
        {W: (U8, (4, 8)), f"{W}_scale": (F8, (4, 1)), f"{W}_scale_2": (F32, ())},
        "(nvfp4)",
    ),
    "bare fp8": (None, {W: (F8, (4, 4))}, f"{W}: stored as 8-bit floats (F8_E4M3) without scales"),
    "bare fp8, with a config": (FP8, {W: (F8, (4, 4))}, "without scales"),
    "both scales": (
        FP8,
        {W: (F8, (4, 4)), f"{W}_scale": (F32, ()), f"{W}_scale_inv": (F32, ())},
        f"with both {W}_scale_inv and {W}_scale",
    ),
    "int8 by dtype": (None, {W: (DType.I8, (4, 4)), f"{W}_scale": (F32, (4, 1))}, f"{W}: I8 [4, 4] with scales"),
    "codes of a quantised model": (FP8, {W: (DType.I32, (4, 4))}, f"{W}: I32 [4, 4] without scales"),
    "exponents as scales": (
        FP8,
        {W: (F8, (4, 64)), f"{W}_scale_inv": (U8, (4, 2))},
        "U8 [4, 2], which are not per row",
    ),
    "another grid": (
        FP8,
        {W: (F8, (256, 256)), f"{W}_scale_inv": (F32, (3, 2))},
        "F32 [3, 2], which are not per row, column or tensor, nor per block of 128x128",
    ),
    "blocks that the config denies": (PER_TENSOR_FP8, {W: (F8, (256, 256)), f"{W}_scale_inv": (F32, (2, 2))}, "[2, 2]"),
    "scales of three in one": (FP8, {W: (F8, (300, 256)), f"{W}_scale": (F32, (3,))}, "F32 [3], which are not"),
    "zero points": (
        compressed(),
        {W: (F8, (4, 4)), f"{W}_scale": (F32, (4, 1)), f"{W}_zero_point": (F8, (4, 1))},
        f"{W}_zero_point: stored as 8-bit floats",
    ),
    "scales beside numbers": (
        compressed(),
        {W: (4, 4), f"{W}_scale": (F32, ())},
        f"{W}_scale: F32 [] beside BF16 [4, 4]",
    ),
    "scales alone": (FP8, {f"{W}_scale_inv": (F32, (1, 1))}, f"{W}_scale_inv: there is no {W}"),
    "packed otherwise": (
        None,
        {"e.w_blocks": (U8, (4, 8, 2, 8)), "e.w_scales": (U8, (4, 8, 2))},
        "e.w_blocks: U8 [4, 8, 2, 8] with scales U8 [4, 8, 2]",
    ),
    "packed twice": (
        None,
        {"e.w_blocks": (U8, (4, 8, 2, 16)), "e.w_scales": (U8, (4, 8, 2)), "e.w": (4, 64, 8)},
        "beside e.w",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    settings, tensors, message = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        read(tensors, settings)
    assert message in caught.value.what
    assert caught.value.where == "model x"
    assert caught.value.remedy


def test_many_problems_are_counted() -> None:
    with pytest.raises(ModelError) as caught:
        read({f"layers.{i}.weight": (F8, (4, 4)) for i in range(20)})
    assert caught.value.what.count("without scales") == 12
    assert caught.value.what.endswith("... and 8 more")


def test_the_config_of_numbers_speaks_of_no_codes() -> None:
    config = {
        "model_type": "a",
        "quantization_config": FP8,
        "text_config": {"compression_config": {"a": 1}, "sizes": [1, 2], "inner": {"quantization_config": None}},
    }
    assert without_quantisation(config) == {"model_type": "a", "text_config": {"sizes": [1, 2], "inner": {}}}
    assert "quantization_config" in config
