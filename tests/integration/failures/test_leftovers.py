"""A store that lets nobody delete keeps what a model was made with, beside a model that is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.errors import StorageError
from support.merging import Events, recipe_of, undisturbed
from support.models import ModelLibrary, contents


def test_what_may_not_be_deleted_is_a_warning(
    models: ModelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    recipe, out = recipe_of("ties", base, tuned), tmp_path / "out"

    def denied(*_: Any) -> None:
        raise StorageError("deleting failed: AccessDenied", where=str(out), remedy="check the policy")

    events = Events()
    with monkeypatch.context() as patch:
        patch.setattr("mergekit_ray.operations.run_plan.clear_notes", denied)
        mergekit_ray.merge(recipe, out, reporter=events)
    (warning,) = events.of("warning")
    assert "the model is complete" in warning["message"]
    assert "AccessDenied" in warning["message"]
    assert list((out / ".mergekit-ray").rglob("*.json"))
    mergekit_ray.merge(recipe, out)  # again, when it may be deleted
    assert contents(out) == undisturbed(recipe, tmp_path / "expected")
