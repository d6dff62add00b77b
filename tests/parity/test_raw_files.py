"""Files that no config describes, by ``mergekit-pytorch`` and by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from parity.comparison import Numbers, difference_units, load_checkpoint, read_tolerances
from parity.conftest import Program

pytestmark = pytest.mark.parity

TOLERANCES = read_tolerances()
IN_FLOAT32 = Numbers("float32", "float32")

SHAPES = {
    "conv_in.weight": (32, 4, 3, 3),
    "down_blocks.0.attn.to_q.weight": (48, 32),
    "down_blocks.1.attn.to_q.weight": (48, 32),
    "mid_block.attn.bias": (48,),
    "time_embed.weight": (64, 16),
    "out.bias": (129,),
}
FLAGS = {"all": (), "intersection": ("--tensor-intersection",), "union": ("--tensor-union",)}


def tensors(seed: int, *more: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One model: a common part, a change of its own, tensors that not all have, and a constant."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in {**SHAPES, **dict.fromkeys(more, (17, 5))}.items():
        base = torch.randn(shape, generator=common) if name in SHAPES else torch.zeros(shape)
        found[name] = (base + 0.3 * torch.randn(shape, generator=own)).to(dtype)
    return {**found, "betas": torch.arange(9)}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("raw")
    made = {
        "base": tensors(1),
        "a": tensors(2),
        "b": tensors(3),
        "c": tensors(4),
        "wide": tensors(5, "ema.weight"),
        "wider": tensors(6, "ema.weight", "extra.weight"),
        "bf16": tensors(7, dtype=torch.bfloat16),
        "fp16": tensors(8, dtype=torch.float16),
        # As PEFT saves factors: no config says which they are.
        "lora_a": {f"base_model.model.q_proj.lora_{p}.weight": tensors(9)["time_embed.weight"] for p in "AB"},
        "lora_b": {f"base_model.model.q_proj.lora_{p}.weight": tensors(10)["time_embed.weight"] for p in "AB"},
    }
    for name, content in made.items():
        save_file({key: tensor.clone() for key, tensor in content.items()}, root / f"{name}.safetensors")
    return {name: str(root / f"{name}.safetensors") for name in made}


def listed(**weights: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": values} for name, values in weights.items()]


LINEAR = {"merge_method": "linear", "models": listed(a={"weight": 0.7}, b={"weight": 0.3}, c={"weight": 0.5})}
PAIR = {"models": [{"model": "a"}, {"model": "b"}]}
SPARSE = listed(a={"weight": 0.6, "density": 0.5}, b={"weight": 0.5, "density": 0.7})
BY_NAME = [
    {"filter": "attn", "value": 0.25},
    {"filter": "down_blocks.1", "value": 0.9},
    {"filter": "bias", "value": 2},
    {"value": 1},
]
FULL = {"dtype": "float32"}
HALF = {"dtype": "bfloat16", "compute_dtype": "inputs"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("all", LINEAR),
    "linear, not normalised": ("all", {**LINEAR, "parameters": {"normalize": False}}),
    "linear by names": ("all", {"merge_method": "linear", "models": listed(a={"weight": BY_NAME}, b={"weight": 1})}),
    "linear in bfloat16": ("all", {**LINEAR, **HALF}),
    "linear stored in half": ("all", {**LINEAR, **FULL, "out_dtype": "float16"}),
    "linear of two dtypes": (
        "all",
        {"merge_method": "linear", "models": listed(bf16={"weight": 0.5}, fp16={"weight": 0.5}), **FULL},
    ),
    "linear of what all have": (
        "intersection",
        {"merge_method": "linear", "models": listed(a={"weight": 0.7}, wide={"weight": 0.3}, wider={"weight": 0.5})},
    ),
    "linear of what any has": (
        "union",
        {"merge_method": "linear", "models": listed(a={"weight": 0.7}, wide={"weight": 0.3}, wider={"weight": 0.5})},
    ),
    "linear of what any has, not normalised": (
        "union",
        {
            "merge_method": "linear",
            "models": listed(wide={"weight": 0.7}, wider={"weight": 0.5}),
            "parameters": {"normalize": False},
        },
    ),
    "slerp": ("all", {"merge_method": "slerp", "base_model": "a", **PAIR, "parameters": {"t": 0.3}, **FULL}),
    "slerp by names": (
        "all",
        {"merge_method": "slerp", "base_model": "a", **PAIR, "parameters": {"t": [*BY_NAME[:1], {"value": 0.6}]}},
    ),
    "nuslerp": ("all", {"merge_method": "nuslerp", "models": listed(a={"weight": 0.7}, b={"weight": 0.3})}),
    "task arithmetic": (
        "all",
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": listed(a={"weight": 0.7}, b={"weight": 0.4}),
        },
    ),
    "task arithmetic, and a base that lacks some": (
        "intersection",
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": listed(wide={"weight": 0.7}, wider={"weight": 0.4}),
        },
    ),
    "task arithmetic, and a base that has more": (
        "all",
        {
            "merge_method": "task_arithmetic",
            "base_model": "wider",
            "models": listed(a={"weight": 0.7}, b={"weight": 0.4}),
        },
    ),
    "task arithmetic of what any has": (
        "union",
        {
            "merge_method": "task_arithmetic",
            "base_model": "wider",
            "models": listed(a={"weight": 0.7}, wide={"weight": 0.4}),
        },
    ),
    "task arithmetic, and a base that is listed": (
        "union",
        {
            "merge_method": "task_arithmetic",
            "base_model": "wider",
            "models": listed(wider={"weight": 1}, a={"weight": 0.7}, wide={"weight": 0.4}),
        },
    ),
    "ties": ("all", {"merge_method": "ties", "base_model": "base", "models": SPARSE, **FULL}),
    "ties of what any has": (
        "union",
        {
            "merge_method": "ties",
            "base_model": "wider",
            "models": listed(a={"weight": 0.6, "density": 0.5}, wide={"weight": 0.5, "density": 0.7}),
            **FULL,
        },
    ),
    "passthrough": ("all", {"merge_method": "passthrough", "models": listed(a={"scale": 0.5})}),
    "model stock": ("all", {"merge_method": "model_stock", "base_model": "base", **PAIR, **FULL}),
    "multislerp": (
        "all",
        {"merge_method": "multislerp", "models": listed(a={"weight": 0.7}, b={"weight": 0.3}), **FULL},
    ),
    "nearswap": (
        "all",
        {"merge_method": "nearswap", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.1}, **FULL},
    ),
    "factors of adapters": (
        "all",
        {"merge_method": "linear", "models": listed(lora_a={"weight": 0.4}, lora_b={"weight": 0.6})},
    ),
}


def with_files(recipe: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    changed = {**recipe, "models": [{**each, "model": files[each["model"]]} for each in recipe["models"]]}
    return changed | ({"base_model": files[recipe["base_model"]]} if "base_model" in recipe else {})


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors(
    case: str, files: dict[str, str], mergekit_ray: Program, pytorch: Program, tmp_path: Path
) -> None:
    which, recipe = CASES[case]
    written = with_files(recipe, files)
    ours, theirs = tmp_path / "ours.yml", tmp_path / "theirs.yml"
    ours.write_text(yaml.safe_dump({**written, "tensors": which}))
    theirs.write_text(yaml.safe_dump({key: value for key, value in written.items() if key != "compute_dtype"}))
    pytorch.run(theirs, tmp_path / "theirs", "--quiet", *FLAGS[which], log=tmp_path / "theirs.log")
    mergekit_ray.run(ours, tmp_path / "ours", "--quiet", log=tmp_path / "ours.log")
    expected, found = load_checkpoint(tmp_path / "theirs"), load_checkpoint(tmp_path / "ours")
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {
        n: (x.dtype, x.shape) for n, x in expected.items()
    }
    arithmetic = getattr(torch, recipe.get("dtype", "float32"))
    # Half precision is compared where both round alike.
    units = TOLERANCES[recipe["merge_method"], IN_FLOAT32].units
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert difference_units(tensor, expected[name], arithmetic).max() <= units, name
        else:
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("which", "recipe"),
    [
        ("all", {"merge_method": "linear", "models": listed(a={"weight": 0.7}, wide={"weight": 0.3})}),
        ("all", {"merge_method": "task_arithmetic", "base_model": "a", "models": listed(wide={"weight": 0.3})}),
        ("union", {"merge_method": "task_arithmetic", "base_model": "a", "models": listed(wide={"weight": 0.3})}),
        ("union", {"merge_method": "nuslerp", "models": listed(a={"weight": 0.7}, wide={"weight": 0.3})}),
    ],
    ids=["not in all", "not in the base", "no task vector", "too few"],
)
def test_what_neither_merges(
    which: str,
    recipe: dict[str, Any],
    files: dict[str, str],
    mergekit_ray: Program,
    pytorch: Program,
    tmp_path: Path,
) -> None:
    written = with_files(recipe, files)
    file = tmp_path / "theirs.yml"
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(pytest.fail.Exception, match="exited with 1"):
        pytorch.run(file, tmp_path / "theirs", "--quiet", *FLAGS[which], log=tmp_path / "theirs.log")
    file.write_text(yaml.safe_dump({**written, "tensors": which}))
    with pytest.raises(pytest.fail.Exception, match=r"ema\.weight"):
        mergekit_ray.run(file, tmp_path / "ours", "--quiet", log=tmp_path / "ours.log")
