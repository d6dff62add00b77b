"""Checkpoints of codes, merged as the numbers they stand for; where transformers can tell on a CPU, by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.core.errors import MergeError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.planning.windows import memory_needed
from support.models import ModelLibrary, config_of, contents, load, logits, tensors_of

BLOCK = 16
UP = "model.layers.1.mlp.up_proj.weight"


def is_quantised(name: str) -> bool:
    """Whether it is a matrix of a layer."""
    return name.endswith("_proj.weight")


def fp8_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and a scale for each block of a matrix that blocks divide."""
    cells = weight.float().unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scales = cells.abs().amax((1, 3)) / 448.0
    codes = (cells / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2, 3).flatten(0, 1), scales


def values_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes stand for, in float64."""
    factors = scales.double().reshape(scales.shape if scales.dim() == 2 else (-1, 1))
    for axis in (0, 1):
        factors = factors.repeat_interleave(codes.shape[axis] // factors.shape[axis], axis)
    return codes.to(torch.float64) * factors


def write(folder: Path, files: list[Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> Path:
    """A checkpoint of several files with an index."""
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


class Fp8Model:
    """A Llama with 8-bit matrices; the scales are in a file of their own.

    Attributes:
        folder: the checkpoint.
        values: what its tensors stand for, in float64.
    """

    def __init__(self, folder: Path, source: Path, block: tuple[int, int] | None = (BLOCK, BLOCK)) -> None:
        weights: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        for name, weight in tensors_of(source).items():
            weights[name], self.values[name] = weight, weight.double()
            if not is_quantised(name):
                continue
            if block is not None:
                weights[name], scales[f"{name}_scale_inv"] = fp8_blocks(weight, *block)
                self.values[name] = values_of(weights[name], scales[f"{name}_scale_inv"])
            else:  # a scale per row, in bfloat16, and one of the activations
                weights[name], found = fp8_blocks(weight, 1, weight.shape[1])
                scales[f"{name}_scale"] = found.bfloat16()
                scales[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
                self.values[name] = values_of(weights[name], scales[f"{name}_scale"])
        settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
        if block is None:
            group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
            settings = {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head"],
            }
        settings["modules_to_not_convert"] = ["lm_head"]
        self.folder = write(folder, [weights, scales], {**config_of(source), "quantization_config": settings})


def gpt_oss(folder: Path, seed: int) -> Path:
    """A small gpt-oss as it is published: experts in MXFP4, everything else in bfloat16."""
    config = transformers.GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )
    generator = torch.Generator().manual_seed(seed)
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, parameter in transformers.GptOssForCausalLM(config).named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, num_rows, num_columns = parameter.shape
            shape = (num_experts, num_columns, num_rows // 32)
            files[0][f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            files[1][f"{name}_scales"] = torch.randint(119, 125, shape, generator=generator, dtype=torch.uint8)
        else:
            files[0][name] = (torch.randn(parameter.shape, generator=generator) * 0.2).bfloat16()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return write(folder, files, {**config.to_dict(), "quantization_config": settings})


def dequantised_by_transformers(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.eval()


def assert_same_weights(ours: Any, theirs: Any) -> None:
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype == torch.bfloat16
        assert torch.equal(parameter, expected[name]), name


def assert_rounded_once(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of a folder is the nearest bfloat16, but for what float32 arithmetic costs."""
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.double() - expected[name]).abs()
        assert (error <= expected[name].abs() * 2.0**-8 * 1.0001 + 1e-12).all(), name


def passthrough(model: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}]}


def average(*models: Path, **more: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, **more}


def test_block_scaled_fp8_is_what_transformers_makes_of_it(models: ModelLibrary, tmp_path: Path) -> None:
    source = Fp8Model(tmp_path / "fp8", models.get(dtype=torch.bfloat16))
    result = mergekit_ray.merge(passthrough(source.folder), tmp_path / "out")
    assert not result.plan.dropped
    ours, theirs = load(tmp_path / "out"), dequantised_by_transformers(source.folder)
    assert_same_weights(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_merge_of_codes_of_two_kinds_and_numbers(models: ModelLibrary, tmp_path: Path) -> None:
    plain = models.get(dtype=torch.bfloat16)
    blocks = Fp8Model(tmp_path / "blocks", models.get(variant=1, dtype=torch.bfloat16))
    rows = Fp8Model(tmp_path / "rows", models.get(variant=2, dtype=torch.bfloat16), None)
    result = mergekit_ray.merge(average(rows.folder, plain, blocks.folder), tmp_path / "out")
    load(tmp_path / "out")
    values = [rows.values, blocks.values, {name: tensor.double() for name, tensor in tensors_of(plain).items()}]
    assert_rounded_once(tmp_path / "out", {name: sum(v[name] for v in values) / 3 for name in values[0]})
    dropped = {name.split(": ")[1] for name in result.plan.dropped}
    assert dropped == {f"{name.removesuffix('weight')}input_scale" for name in rows.values if is_quantised(name)}
    assert config_of(tmp_path / "out") == config_of(plain)


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_codes_merge_to_the_same_bytes_as_their_numbers(method: str, models: ModelLibrary, tmp_path: Path) -> None:
    """Also for methods that look at whole tensors."""
    sources = [Fp8Model(tmp_path / f"m{i}", models.get(variant=i, dtype=torch.bfloat16)) for i in range(2)]
    numbers = [
        write(tmp_path / f"p{i}", [{n: v.float() for n, v in m.values.items()}], config_of(models.get()))
        for i, m in enumerate(sources)
    ]

    def merged(name: str, base: Path, other: Path) -> dict[str, torch.Tensor]:
        recipe: dict[str, Any] = {"merge_method": method, "base_model": str(base), "dtype": "float32"}
        if method == "slerp":
            recipe |= {"models": [{"model": str(base)}, {"model": str(other)}], "parameters": {"t": 0.3}}
        else:
            recipe |= {"models": [{"model": str(other), "parameters": {"weight": 0.6, "density": 0.5}}]}
        mergekit_ray.merge(recipe, tmp_path / name)
        return tensors_of(tmp_path / name)

    found = merged("of codes", *(source.folder for source in sources))
    expected = merged("of numbers", *numbers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gpt_oss_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "mxfp4", 1)
    mergekit_ray.merge(passthrough(source), tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), dequantised_by_transformers(source)
    assert_same_weights(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_a_merge_of_two_gpt_oss(tmp_path: Path) -> None:
    sources = [gpt_oss(tmp_path / f"m{i}", i) for i in range(2)]
    mergekit_ray.merge(average(*sources), tmp_path / "out")
    values = [dict(dequantised_by_transformers(source).named_parameters()) for source in sources]
    assert_rounded_once(
        tmp_path / "out", {name: (values[0][name].double() + values[1][name].double()) / 2 for name in values[0]}
    )
    load(tmp_path / "out")


def test_an_adapter_on_codes(models: ModelLibrary, tmp_path: Path) -> None:
    base = Fp8Model(tmp_path / "fp8", models.get(dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, 32), (64, 2)))
    module = f"base_model.model.{UP.removesuffix('.weight')}"
    (tmp_path / "adapter").mkdir()
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    mergekit_ray.merge(passthrough(Path(f"{base.folder}+{tmp_path / 'adapter'}")), tmp_path / "out")
    assert_rounded_once(tmp_path / "out", base.values | {UP: base.values[UP] + 2.0 * b.double() @ a.double()})
    load(tmp_path / "out")


def test_the_bytes_depend_on_nothing_but_the_recipe(models: ModelLibrary, tmp_path: Path) -> None:
    blocks = Fp8Model(tmp_path / "fp8", models.get(dtype=torch.bfloat16)).folder
    for number, recipe in enumerate(
        [average(blocks, models.get(variant=1)), passthrough(gpt_oss(tmp_path / "oss", 3))]
    ):
        found = []
        least = memory_needed(mergekit_ray.plan(recipe))
        for i, options in enumerate([MergeOptions(), MergeOptions(chunk_elements=501, memory_bytes=least)]):
            mergekit_ray.merge(recipe, tmp_path / f"out{number}-{i}", options=options)
            found.append(
                {n: d for n, d in contents(tmp_path / f"out{number}-{i}").items() if n.endswith("safetensors")}
            )
        assert found[0]
        assert found[0] == found[1]


def test_a_code_that_is_no_number_is_named(models: ModelLibrary, tmp_path: Path) -> None:
    source = Fp8Model(tmp_path / "fp8", models.get(dtype=torch.bfloat16)).folder
    file = source / "model-00001-of-00002.safetensors"
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if "_scale" not in name}
    tensors[UP].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MergeError) as caught:
        mergekit_ray.merge(average(source, source), tmp_path / "out")
    assert caught.value.where == f"model {source}, tensor {UP!r}"
    assert f"code 0xFF, no finite number, in the input, first at flat index {3 * 32 + 5} " in caught.value.what
    mergekit_ray.merge(average(source, source), tmp_path / "allowed", options=MergeOptions(allow_non_finite=True))
    bad = tensors_of(tmp_path / "allowed")[UP].isnan().nonzero()
    assert bad.tolist() == [[3, 5]]


def test_modelopt_has_a_scale_for_each_tensor(models: ModelLibrary, tmp_path: Path) -> None:
    """Scales of inputs and of the key-value cache are named as dropped; what its files say of codes is not copied."""
    source = models.get("llama")
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, weight in tensors_of(source).items():
        tensors[name], expected[name] = weight, weight.double()
        if is_quantised(name):
            scale = weight.float().abs().max() / 448.0
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
            expected[name] = tensors[name].double() * scale.double()
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    said = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    folder = write(tmp_path / "model", [tensors], {**config_of(source), "quantization_config": said})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": "float32"}
    result = mergekit_ray.merge(recipe, tmp_path / "out", options=MergeOptions(executor="local"))
    made = tensors_of(tmp_path / "out")
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(made[name], values.float()), name
    dropped = {name.rpartition(".")[2] for name in result.plan.dropped}
    assert dropped == {"input_scale", "k_scale"}
    assert result.plan.warnings == ()
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()
