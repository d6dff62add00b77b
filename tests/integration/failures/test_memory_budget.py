"""What a worker holds, beside what the plan says it will: embeddings of 262 144 rows, and every kind of method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from benchmarks.endless import register
from benchmarks.measure import measure
from benchmarks.memory import RECIPES, recipe
from mergekit_ray.planning.windows import comfortable_memory, memory_needed

pytestmark = pytest.mark.memory

TOLERANCE = 1.25
NOTHING = "import numba, numpy, torch, mergekit_ray.operations.run_plan"


@pytest.fixture(scope="module")
def idle_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a process that has imported everything and does nothing."""
    log = tmp_path_factory.mktemp("idle") / "log"
    command = [sys.executable, "-c", f"{NOTHING}\nimport time; time.sleep(1)"]
    return measure(command, log=log).peak_anonymous_bytes


@pytest.fixture(scope="module", autouse=True)
def noise() -> None:
    register()


@pytest.mark.parametrize("budget_of", [comfortable_memory, memory_needed], ids=["comfortable", "least"])
@pytest.mark.parametrize("method", RECIPES)
def test_a_worker_holds_its_budget(method: str, budget_of: Any, idle_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(recipe(method, "wide"))
    budget = budget_of(mergekit_ray.plan(file))
    command = [sys.executable, "-m", "benchmarks.memory", "--run", str(file), "--memory", f"{budget}B"]
    found = measure(command, log=tmp_path / "log")
    held = found.peak_anonymous_bytes - idle_bytes
    assert held <= TOLERANCE * budget, f"{held / 1e6:.0f} MB of {budget / 1e6:.0f} MB"
