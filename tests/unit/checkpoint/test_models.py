"""Models of a recipe, opened at once: a plus that stands in a folder's name rather than before an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import MergekitRayError
from support.memory_inputs import write_model


def opening(text: str) -> str:
    """What is said when a model cannot be opened."""
    with pytest.raises(MergekitRayError) as caught:
        open_models([ModelReference.parse(text)])
    return str(caught.value)


@pytest.mark.parametrize("has_base", [False, True])
def test_a_folder_with_a_plus_is_named_as_it_must_be_written(tmp_path: Path, *, has_base: bool) -> None:
    folder = write_model(tmp_path / "math+code", {}, {})
    if has_base:
        write_model(tmp_path / "math", {"a": torch.zeros(1)}, {})
    said = opening(f"{folder}")
    assert f"for the folder {folder}, write {tmp_path}/math\\+code" in said
    assert f"{tmp_path}/math\\+code" == str(ModelReference(str(folder)))


def test_other_folders_are_not_spoken_of(tmp_path: Path) -> None:
    assert "for the folder" not in opening(f"{tmp_path}/math+code")
    assert "for the folder" not in opening(f"{tmp_path}/math")


def test_the_escaped_folder_is_opened(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "math+code", {}, {})
    assert "hold no tensors" in opening(str(ModelReference(str(folder))))
