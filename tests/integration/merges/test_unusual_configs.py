"""Configs that Python reads and JSON does not have: what is in them arrives in the result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray.cli import app
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from mergekit_ray.output.manifest import read_manifest
from mergekit_ray.storage.opening import open_source

LOCAL = MergeOptions(executor="local", num_workers=1)


@pytest.fixture(params=["Infinity", '{"__float__": "Infinity"}'], ids=["transformers 4", "transformers 5"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Mamba 2, whose time steps have no limit."""
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "state_size": 4}
    made = transformers.Mamba2Config(**sizes, num_heads=4, head_dim=4, n_groups=1, expand=2)
    transformers.Mamba2ForCausalLM(made).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"time_step_limit": [0.0, "HERE"]}
    file.write_text(json.dumps(config).replace('"HERE"', request.param))
    return tmp_path / "model"


def test_infinities_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    out = tmp_path / "out"
    mergekit_ray.merge(recipe, out, options=LOCAL)
    limits = [json.loads((folder / "config.json").read_text())["time_step_limit"] for folder in (model, out)]
    assert limits[0] == limits[1]
    loaded = transformers.AutoConfig.from_pretrained(out)
    assert list(loaded.time_step_limit) == [0.0, math.inf]
    assert not verify(open_source(str(out))).problems
    assert not reproduce(read_manifest(str(out)), str(tmp_path / "again"), LOCAL).problems
    again = mergekit_ray.merge(recipe, out, options=LOCAL)
    assert again.was_there


def test_a_plan_is_strict_json(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    done = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert done.exit_code == 0

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(done.stdout, parse_constant=refuse)["plan"]
    assert found["config"]["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert Plan.from_json(found).digest == mergekit_ray.plan(recipe).digest
