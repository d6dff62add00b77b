"""Adapters on stages: what merging the stage, and then the adapter on what was written, makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mergekit_ray
from mergekit_ray import MergeOptions
from mergekit_ray.core.errors import ModelError
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from support.adapters import make_adapter
from support.models import contents
from support.tokenizers.models import byte_level, save_model

LOCAL = MergeOptions(executor="local", device="cpu")
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, byte_level(), seed, dtype=torch.bfloat16) for seed, name in enumerate("abc")}


def adapter_on(model: Path, folder: Path, **settings: Any) -> Path:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return make_adapter(loaded, folder, **{"target_modules": PROJECTIONS, **settings})


def first(folders: dict[str, Path]) -> dict[str, Any]:
    models = [{"model": str(folders[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16"}


def second(folders: dict[str, Path], adapted: str, **rest: Any) -> dict[str, Any]:
    models = [{"model": model, "parameters": {"weight": 0.6}} for model in (adapted, str(folders["c"]))]
    return {"merge_method": "task_arithmetic", "base_model": str(folders["a"]), "models": models, **rest}


def assert_same(found: Path, expected: Path) -> None:
    told = ("README.md", "mergekit-ray.json")
    ours, theirs = contents(found), contents(expected)
    assert {name: ours[name] for name in ours if name not in told} == {
        name: theirs[name] for name in theirs if name not in told
    }


@pytest.mark.parametrize("rest", [{}, {"compute_dtype": "float64"}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "o_proj"]}],
    ids=str,
)
def test_the_same_as_stage_by_stage(
    settings: dict[str, Any], rest: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapter_on(folders["a"], tmp_path / "adapter", **settings)
    mergekit_ray.merge(first(folders), tmp_path / "first", options=LOCAL)
    mergekit_ray.merge(second(folders, f"{tmp_path}/first+{adapter}", **rest), tmp_path / "apart", options=LOCAL)
    stages = [{"name": "first", **first(folders)}, second(folders, f"first+{adapter}", **rest)]
    mergekit_ray.merge({"stages": stages}, tmp_path / "out", options=LOCAL)
    assert_same(tmp_path / "out", tmp_path / "apart")


def test_its_tokenizer_travels_too(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_on(folders["a"], tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["c"] / name, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    stages = [
        {"name": "first", **first(folders)},
        {"merge_method": "passthrough", "models": [{"model": f"first+{adapter}"}]},
    ]
    mergekit_ray.merge({"stages": stages}, tmp_path / "out", options=LOCAL)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert verify(str(tmp_path / "out")).ok
    assert reproduce(tmp_path / "out", tmp_path / "again").ok


def test_an_adapter_that_does_not_fit_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", byte_level(), 9, hidden_size=48, num_attention_heads=4)
    adapter = adapter_on(wide, tmp_path / "adapter")
    stages = [{"name": "first", **first(folders)}, second(folders, f"first+{adapter}")]
    with pytest.raises(ModelError, match="adapter"):
        mergekit_ray.merge({"stages": stages}, tmp_path / "out", options=LOCAL)
    assert not (tmp_path / "out").exists()
