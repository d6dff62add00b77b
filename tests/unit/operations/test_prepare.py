"""What operations on a recipe begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray.cli import app
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.operations.prepare import prepare

RECIPE = {"merge_method": "linear", "models": [{"model": "/no/such/model", "parameters": {"weight": 1}}]}
"""Whose models are only looked for once all that the recipe and the command say is right."""

LAST = (1 << 63) - 1


@pytest.mark.parametrize("seed", [-1, LAST + 1, 10**30, "x", 1.5, float("nan"), [1]])
def test_no_source_of_a_seed_takes_one_that_cannot_be_reproduced(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        mergekit_ray.load_recipe(RECIPE | {"seed": seed})
    for operation in (mergekit_ray.merge, mergekit_ray.plan):
        with pytest.raises(ConfigError, match="is not a whole number from 0 to 9223372036854775807"):
            operation(RECIPE | {"output": "/no/such/output"}, seed=seed)  # type: ignore[arg-type]  # what callers may not give


@pytest.mark.parametrize("seed", [0, 7, LAST])
def test_all_sources_take_the_others(seed: int) -> None:
    assert mergekit_ray.load_recipe(RECIPE | {"seed": seed}).seed == seed
    with pytest.raises(ModelError):
        prepare(RECIPE, seed=seed)


@pytest.mark.parametrize("seed", ["-1", str(LAST + 1), "x", "1.5"])
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_on_the_command_line(command: str, seed: str, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(json.dumps(RECIPE | {"output": "/no/such/output"}))
    done = CliRunner().invoke(app, [command, str(tmp_path / "r.yml"), "--seed", seed])
    assert done.exit_code == 2
    assert "seed" in done.stderr


def test_a_recipe_built_in_python_is_checked_against_its_method() -> None:
    recipe = mergekit_ray.DenseRecipe(
        merge_method="ties", models=[{"model": "/no/such/model", "parameters": {"wieght": 1}}]
    )
    for run in (lambda: mergekit_ray.merge(recipe, "out"), lambda: mergekit_ray.plan(recipe)):
        with pytest.raises(ConfigError, match=r"2 problems(.|\n)*did you mean 'weight'(.|\n)*needs a base model"):
            run()
