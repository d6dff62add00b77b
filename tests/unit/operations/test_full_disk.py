"""A disk that is full, or a quota that is used up, at any file of a merge: told at once, and nothing is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mergekit_ray.core.errors import StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.storage.local.upload import LocalUpload
from support.merging import Events
from support.models import contents

LOCAL = MergeOptions(executor="local", num_workers=1)
FILES = [
    *(".mergekit-ray/lease.json", "/plan.json", "-00002-of-00003.safetensors", "-00002-of-00003.safetensors.json"),
    *("config.json", "tokenizer.json", "README.md", "mergekit-ray.json", "model.safetensors.index.json"),
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("file", FILES)
def test_it_is_told_at_once(
    file: str, number: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    reserve = LocalUpload._reserve

    def full(upload: LocalUpload) -> None:
        if upload._name.endswith(file):
            asked.append(file)
            raise OSError(number, os.strerror(number))
        reserve(upload)

    out, events = tmp_path / "out", Events()
    with monkeypatch.context() as patch:
        patch.setattr(LocalUpload, "_reserve", full)
        with pytest.raises(StorageError, match="no space left") as caught:
            run_plan(plan, str(out), LOCAL, reporter=events)
    assert str(caught.value.where).endswith(file)
    assert "free some space or choose another place, and run again to resume" in str(caught.value)
    assert asked == [file]
    assert not events.of("shard_retried")
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.rglob("*.tmp"))
    again = run_plan(plan, str(out), LOCAL)
    assert again.num_resumed >= (3 if FILES.index(file) > 3 else 0)
    run_plan(plan, str(tmp_path / "expected"), LOCAL)
    assert contents(out) == contents(tmp_path / "expected")
