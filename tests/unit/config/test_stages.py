"""Recipes of several stages: what makes no sense is refused, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_ray.config.load import load_recipe
from mergekit_ray.core.errors import ConfigError


def of(method: str, *models: str, **rest: Any) -> dict[str, Any]:
    """A recipe of equal weights."""
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": method, "models": listed, **rest}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: [of("linear", "a", "y", name="x"), of("linear", "x", "b", name="y")], "a circle: x -> y -> x"),
        (lambda: [of("linear", "x", "b", name="x")], "in a circle: x -> x"),
        (lambda: [of("linear", "a", "b", name="x"), of("linear", "a", "b", name="x")], "have the name 'x'"),
        (lambda: [of("linear", "a", "b", name="x"), of("linear", "a", "c")], "nothing merges stage 'x'"),
        (lambda: [of("linear", "a", "b"), of("linear", "a", "c")], "this stage has no `name`"),
        (lambda: [of("linear", "a", "b", name="skills"), of("linear", "skils", "c")], "did you mean 'skills'?"),
        (lambda: [of("linear", "a", "b", name="a@b"), of("linear", "a@b", "c")], "cannot be called 'a@b'"),
        (lambda: [of("linear", "a", "b", name="./k"), of("linear", "./k", "c")], "cannot be called './k'"),
        (lambda: [of("linear", "a", "b", name="x"), {"stages": []}], "cannot have stages of its own"),
        (lambda: [of("linear", "a", "b", name="x"), of("linear", "x@main", "c")], "a stage with a revision"),
        (lambda: [of("linear", "a", "b", name="x"), of("linaer", "x", "c")], "did you mean 'linear'"),
        (list, "an empty list"),
        (lambda: [3], "a recipe is a mapping, found 3"),
    ],
)
def test_stages_that_make_no_sense(stages: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe({"stages": stages()})
    assert message in str(caught.value)


def test_errors_have_the_line_of_their_document(tmp_path: Path) -> None:
    first = yaml.safe_dump(of("linear", "a", "b", name="x"))
    file = tmp_path / "stages.yml"
    file.write_text(f"{first}---\nmerge_method: linear\nmodels:\n  - {{model: x, parameters: {{wieght: 1}}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    line = first.count("\n") + 4
    assert f"stages.yml:{line}" in str(caught.value)


def test_an_output_for_all(tmp_path: Path) -> None:
    stages = [of("linear", "a", "b", name="x"), of("linear", "x", "c")]
    loaded = load_recipe({"stages": stages, "output": str(tmp_path / "out")})
    assert loaded.output.path == str(tmp_path / "out")
    with pytest.raises(ConfigError, match="the last stage has one too"):
        load_recipe({"stages": [stages[0], {**stages[1], "output": "z"}], "output": "y"})
