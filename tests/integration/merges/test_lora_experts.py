"""Adapters of parameters that hold all experts of a layer, made and merged by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from support.adapters import make_adapter, merged_by_peft, passthrough, quiet
from support.models import SMALL_TEXT, load

SIZES = {**SMALL_TEXT, "num_experts_per_tok": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def gpt_oss(inner: int = 24) -> Any:
    """Stored as one tensor for all experts, inputs by outputs."""
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": inner}, num_local_experts=3)
    return transformers.GptOssForCausalLM(config)


def square() -> Any:
    """One of the two is square, and only the family says which way it lies."""
    return gpt_oss(16)


def qwen() -> Any:
    """Stored as three matrices for each expert."""
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=12)
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    """Stored as three matrices for each expert, below another name."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (gpt_oss, {"target_parameters": BOTH, "target_modules": ["q_proj"]}),
        (square, {"target_parameters": BOTH, "target_modules": [], "use_rslora": True}),
        (qwen, {"target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 5}, "target_modules": ["v_proj"]}),
        (mixtral, {"target_parameters": ["experts.down_proj"], "target_modules": []}),
    ],
)
def test_what_peft_merges(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    with quiet():
        adapter = make_adapter(load(tmp_path / "base"), tmp_path / "adapter", **settings)
        theirs = merged_by_peft(tmp_path / "base", adapter).state_dict()
    mergekit_ray.merge(passthrough(f"{tmp_path / 'base'}+{adapter}"), tmp_path / "out")
    ours, before = load(tmp_path / "out").state_dict(), load(tmp_path / "base").state_dict()
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert {name.rpartition(".")[2] for name in changed if "experts" in name} == {
        name.rpartition(".")[2] for name in settings["target_parameters"]
    }
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), theirs[name].double(), rtol=1e-6, atol=1e-7, msg=name)
