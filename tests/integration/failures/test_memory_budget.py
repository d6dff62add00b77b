"""What a worker holds, beside what the plan says it will: embeddings of 262 144 rows, and every kind of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.endless import register
from benchmarks.memory import STREAMED, adapted_recipe, recipe, usage
from mergekit_ray.planning.windows import comfortable_memory, memory_needed

pytestmark = [
    pytest.mark.memory,
    pytest.mark.parametrize("budget_of", [comfortable_memory, memory_needed], ids=["comfortable", "least"]),
]


@pytest.fixture(scope="module", autouse=True)
def noise() -> None:
    register()


def check(text: str, budget_of: Any, folder: Path) -> None:
    file = folder / "recipe.yml"
    file.write_text(text)
    found = usage(file, budget_of)
    assert found.used_bytes <= found.asked_bytes


@pytest.mark.parametrize("method", STREAMED)
def test_a_worker_holds_its_budget(method: str, budget_of: Any, tmp_path: Path) -> None:
    check(recipe(method, "wide"), budget_of, tmp_path)


def test_with_ten_models(budget_of: Any, tmp_path: Path) -> None:
    check(recipe("ties", "tall", 10), budget_of, tmp_path)


def test_with_an_adapter_of_high_rank(budget_of: Any, tmp_path: Path) -> None:
    check(adapted_recipe(tmp_path / "adapter", "layer"), budget_of, tmp_path)


def test_with_rows_in_another_order(budget_of: Any, tmp_path: Path) -> None:
    asked, used = rows.usage("1.1b", budget_of, tmp_path / "log")
    assert used <= asked
