"""A Mixture of Experts of models in the first layout of Phi-2, which transformers does not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.operations.prepare import prepare
from support.custom_moe import code_kept_in, load_custom
from support.models import logits, tensors_of
from support.phi_msft import LAYERS, save_phi_msft

TOKENS = {"the capital of": [1, 4, 5, 6], "Paris is": [1, 9, 8]}
"""Prompts with their tokens."""


@pytest.fixture(scope="module", autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with code_kept_in(tmp_path_factory.mktemp("code")):
        yield


def recipe(base: Path, *experts: Path) -> dict[str, Any]:
    listed = [
        {"source_model": str(path), "positive_prompts": [prompt]} for path, prompt in zip(experts, TOKENS, strict=True)
    ]
    return {"base_model": str(base), "gate_mode": "hidden", "dtype": "bfloat16", "experts": listed}


def test_routers_are_those_of_its_own_forward_pass(tmp_path: Path) -> None:
    a, b = (save_phi_msft(tmp_path / name, seed) for seed, name in enumerate("ab"))
    prepare(recipe(a, a, b)).check_routable()
    mergekit_ray.merge(recipe(a, a, b), tmp_path / "out")
    model = load_custom(a).float()
    with torch.inference_mode():
        states = [model(torch.tensor([tokens])).hidden_states for tokens in TOKENS.values()]
    ours = tensors_of(tmp_path / "out")
    for layer in range(LAYERS):
        rows = torch.stack([of_prompt[layer][0, -1] for of_prompt in states])
        expected = (rows / rows.norm(dim=1, keepdim=True)).bfloat16()
        found = ours[f"transformer.h.{layer}.mlp.gate.weight"]
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-5)
    assert torch.isfinite(logits(load_custom(tmp_path / "out"))).all()


def test_experts_that_are_the_base_model_make_the_base_model(tmp_path: Path) -> None:
    a = save_phi_msft(tmp_path / "a", 1)
    mergekit_ray.merge({**recipe(a, a, a), "dtype": "float16", "allow_identical_experts": True}, tmp_path / "out")
    merged, dense = load_custom(tmp_path / "out").float(), load_custom(a).float()
    torch.testing.assert_close(logits(merged), logits(dense), rtol=1e-4, atol=1e-4)
