"""A sample of the sweep over all families (`make families`), and that the sweep sees what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from support.sweep.columns import COLUMNS, Outcome, Status, outcomes
from support.sweep.run import PAGE

SAMPLE = ("bert", "deepseek_v3", "falcon_mamba", "gpt2", "qwen2_vl", "qwen3_next")
"""An encoder, experts behind dense layers, no attention, other names, a tower beside, two kinds of layers."""


def on_the_page(family: str) -> list[str]:
    [row] = re.findall(rf"^\| `{family}` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r" \(\d+\)$", "", cell) for cell in row.split(" | ")]


@pytest.mark.parametrize("family", SAMPLE)
def test_the_page_says_what_comes_of_a_family(family: str, tmp_path: Path) -> None:
    found = outcomes(family, tmp_path)
    assert Status.WRONG not in {outcome.status for outcome in found.values()}, found
    assert [found[column].status.value for column in COLUMNS] == on_the_page(family)


def other_weights(recipe: dict[str, Any]) -> None:
    if recipe["merge_method"] == "linear":
        recipe["models"][1]["parameters"]["weight"] = 0.6


def other_layers(recipe: dict[str, Any]) -> None:
    for each in recipe.get("slices", [])[1:2]:
        each["sources"][0]["layer_range"] = [0, 3]


def no_adapter(recipe: dict[str, Any]) -> None:
    model = recipe.get("models", [{"model": ""}])[0]
    model["model"] = model["model"].partition("+")[0]


@pytest.mark.parametrize(("fault", "column"), [*zip((other_weights, other_layers, no_adapter), COLUMNS, strict=True)])
def test_a_fault_is_found_in_its_column(
    fault: Callable[[dict[str, Any]], None], column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = mergekit_ray.merge

    def merge_wrongly(recipe: dict[str, Any], *args: Any, **more: Any) -> Any:
        fault(recipe)
        return merge(recipe, *args, **more)

    monkeypatch.setattr(mergekit_ray, "merge", merge_wrongly)
    found = outcomes("llama", tmp_path)
    assert found.pop(column).status is Status.WRONG
    assert set(found.values()) == {Outcome(Status.WORKS)}
