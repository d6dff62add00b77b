"""`inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.operations.inspect import Inspection, inspect
from support.memory_inputs import random_llama, write_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "tie_word_embeddings": False,
    "vocab_size": 20,
}
NUM_PARAMETERS = 2 * 20 * 8 + 2 * (8 * 8 + 8) + 8


def test_a_plain_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_llama(0), CONFIG)
    found = inspect(folder)
    assert found == Inspection(
        model=str(folder),
        uri=str(folder),
        family="llama",
        architectures=("LlamaForCausalLM",),
        num_layers=2,
        hidden_size=8,
        vocab_size=20,
        dtypes={"bfloat16": NUM_PARAMETERS},
        tied=False,
        quantisation=None,
        num_parameters=NUM_PARAMETERS,
        num_bytes=(folder / "model.safetensors").stat().st_size,
        num_files=1,
    )
    line = f"<Inspection {folder}: llama, 2 layers, {NUM_PARAMETERS} parameters, bfloat16, "
    assert repr(found).startswith(line)
    for text in ("LlamaForCausalLM", ">20<", "not a word"):
        assert (text in found._repr_html_()) == (text != "not a word")


def test_a_tied_model_counts_its_embedding_once(tmp_path: Path) -> None:
    tensors = random_llama(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = write_model(tmp_path / "model", tensors, CONFIG | {"tie_word_embeddings": True, "hidden_size": None})
    found = inspect(str(folder))
    assert (found.tied, found.hidden_size) == (True, 8)
    assert found.num_parameters == NUM_PARAMETERS - 20 * 8
    assert found.dtypes == {"bfloat16": NUM_PARAMETERS, "float32": 4}


def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As 8-bit floats with a scale per tensor."""
    codes = {}
    for name, tensor in tensors.items():
        codes[name] = tensor
        if name.endswith("q_proj.weight"):
            codes[name] = tensor.to(torch.float8_e4m3fn)
            codes[f"{name}_scale"] = torch.ones(1)
    return codes


@pytest.mark.parametrize("config", [{"quantization_config": {"quant_method": "fbgemm_fp8"}}, {}])
def test_a_quantised_model_counts_weights_not_codes(tmp_path: Path, config: dict[str, Any]) -> None:
    found = inspect(write_model(tmp_path / "model", quantised(random_llama(0)), CONFIG | config))
    assert found.quantisation == ("fbgemm_fp8" if config else "fp8")
    assert found.num_parameters == NUM_PARAMETERS
    assert found.dtypes == {"bfloat16": NUM_PARAMETERS - 2 * 64, "float8_e4m3fn": 2 * 64, "float32": 2}


def test_codes_that_are_not_read_are_told_not_counted(tmp_path: Path) -> None:
    tensors = random_llama(0)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 1, dtype=torch.int32)
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    found = inspect(write_model(tmp_path / "model", tensors, config))
    assert (found.quantisation, found.num_parameters) == ("gptq", None)
    [warning] = found.warnings
    assert warning.startswith("it cannot be merged: ")
    assert "unknown parameters" in repr(found)
    assert "it cannot be merged" in found._repr_html_()


def test_what_a_config_does_not_say_is_left_open(tmp_path: Path) -> None:
    tensors = {"layers.0.weight": torch.ones(3, 3)}
    found = inspect(write_model(tmp_path / "model", tensors, {"architectures": "nonsense"}))
    assert (found.family, found.architectures, found.hidden_size, found.vocab_size) == (None, (), None, None)
    assert (found.num_layers, found.num_parameters) == (1, 9)
    assert "unknown family, 1 layer, 9 parameters" in repr(found)


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model's path is empty"):
        inspect("")
    with pytest.raises(ModelError):
        inspect(tmp_path / "nothing")
