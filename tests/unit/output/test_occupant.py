"""Whose output is in the way, in words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.output.destination import MANIFEST_FILE, RECORD_ROOT, inspect
from mergekit_ray.output.occupant import described, files_told, occupant
from mergekit_ray.storage.local.store import LocalStore

TASK = {"merge_method": "task_arithmetic", "base_model": "BASE", "models": [{"model": "A"}, {"model": "B"}]}


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (TASK, "a task_arithmetic merge of A and B onto BASE"),
        ({**TASK, "models": [{"model": "BASE"}, {"model": "A"}]}, "a task_arithmetic merge of A onto BASE"),
        ({"merge_method": "iso_c", "models": [{"model": "A"}], "base_model": "B"}, "an iso_c merge of A onto B"),
        (
            {"merge_method": "linear", "models": [{"model": name} for name in "ABCDEF"]},
            "a linear merge of A, B, C, D and 2 more",
        ),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": "A", "layer_range": [0, 2]}]}, {"sources": [{"model": "B"}]}],
            },
            "a passthrough merge of A and B",
        ),
        (
            {"base_model": "A", "experts": [{"source_model": "B"}, {"source_model": "C"}, {"source_model": "B"}]},
            "a Mixture of Experts of B and C onto A",
        ),
        ({"modules": {"default": {"slices": [{"sources": [{"model": "A"}]}]}}}, "a merge of modules of A"),
        ({"merge_method": 3, "models": "A"}, None),
        ({"merge_method": "linear", "models": [{"model": 3}, "A"], "base_model": ["B"]}, "a linear merge"),
    ],
)
def test_recipes(recipe: dict[str, Any], text: str | None) -> None:
    assert described(recipe) == text


def test_adapters() -> None:
    adapter = {"finetuned": "A", "base": "B", "rank": 8, "energy": None}
    assert (
        occupant(adapter, is_finished=True) == "another extraction's adapter is there: what A learnt beyond B, rank 8"
    )
    merge = "a merge's output is there: a task_arithmetic merge of A and B onto BASE"
    assert occupant({"recipe": TASK}, is_finished=True) == merge


def test_files_that_nobody_accounts_for_are_listed() -> None:
    assert files_told(["a", "b"]) == "other files are there already: a, b"
    assert files_told(list("abcdef")) == "other files are there already: a, b, c, d and 2 more"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": TASK}, "another recipe's output is there: a task_arithmetic merge of A and B onto BASE"),
        ({"seed": 7, "recipe": {"seed": 7}}, "this recipe's output with seed 7 is there, and the seed is 0 now"),
        ({}, "this recipe's output from other inputs, or by another version of mergekit-ray, is there"),
        ({"recipe": [3]}, "other files are there already: config.json, mergekit-ray.json"),
    ],
)
def test_a_merge_is_refused_in_words(plan: Plan, change: dict[str, Any], told: str, tmp_path: Any) -> None:
    sink = LocalStore(tmp_path / "out")
    manifest = {"plan_digest": "another", "seed": plan.seed, **change}
    recipe = change.get("recipe", {})  # that of the plan, with a seed of its own or none; or another
    manifest["recipe"] = recipe if recipe in (TASK, [3]) else {**plan.recipe, **recipe}
    sink.put(MANIFEST_FILE, json.dumps(manifest).encode())
    sink.put("config.json", b"{}")
    with pytest.raises(PlanError) as caught:
        inspect(sink, plan, overwrite=False)
    assert caught.value.what == told
    assert "`options=MergeOptions(overwrite=True)`" in str(caught.value.remedy)


def test_unfinished_work_says_whose_it_is(plan: Plan, tmp_path: Any) -> None:
    sink = LocalStore(tmp_path / "out")
    other = replace(plan, recipe=TASK)
    note = {"plan_digest": other.digest, "seed": 0, "recipe": TASK}
    sink.put(f"{RECORD_ROOT}/{other.digest}/plan.json", json.dumps(note).encode())
    sink.put(f"{RECORD_ROOT}/{other.digest}/model-00001-of-00002.safetensors.json", b"{}")
    with pytest.raises(PlanError) as caught:
        inspect(sink, plan, overwrite=False)
    assert caught.value.what == (
        "another recipe's unfinished output is there: a task_arithmetic merge of A and B onto BASE"
    )
