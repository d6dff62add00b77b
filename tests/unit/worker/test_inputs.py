"""What a worker reads: where it lies, what is wrong with it, and what changes meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.core.errors import CheckpointError, MergeError
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.planning import windows as planned_windows
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.protocols import MappedRange
from support.shards import BUDGETS, big_model, files_below, load_of, long_tensors, make_worker, merged, shard_of


def test_tensors_at_odd_places_of_a_file(tmp_path: Path) -> None:
    """The format allows headers of any length; numbers are then unaligned."""
    data = [torch.randn(90_001, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16) for i in range(2)]
    models = []
    for name, tensor in zip("ab", data, strict=True):
        big_model(tmp_path / "even" / name, tensor)
        content = (tmp_path / "even" / name / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        spaced = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        models.append(big_model(tmp_path / name, tensor, content=spaced))
    loads = [load_of(model, "t0") for model in models]
    assert all(load.location.start % 2 for load in loads)
    shard = shard_of(("t0", merged("t0", *loads)))
    worker = make_worker({model.key: model for model in models}, tmp_path / "out")
    worker.run(shard)
    worker.close()
    exact = (data[0].double() + 2 * data[1].double()) / 3
    found = load_file(tmp_path / "out" / shard.file)["t0"]
    assert (found.double() - exact).abs().le(exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()


def test_a_damaged_input_leaves_nothing_and_names_the_model(tmp_path: Path) -> None:
    tensors = long_tensors(0)
    tensors[0][200_000] = float("nan")
    model = big_model(tmp_path / "a", *tensors)
    output = tmp_path / "out"
    worker = make_worker({"a": model}, output, memory_bytes=BUDGETS["tiny"])
    for expression in (merged("w", load_of(model, "t0")), load_of(model, "t0")):
        with pytest.raises(MergeError, match="first at flat index 200000") as caught:
            worker.run(shard_of(("w", expression)))
        assert caught.value.where == "model org/a, tensor 't0'"
        assert files_below(output) == set()
    # The worker is fit for the next shard.
    worker.run(shard_of(("fine", load_of(model, "t2"))))
    assert worker.resources.buffers.total_bytes <= 3 * 500_000
    worker.close()
    tolerant = make_worker({"a": model}, output, allow_non_finite=True)
    tolerant.run(shard_of(("w", load_of(model, "t0"))))
    tolerant.close()


def test_an_input_that_changed_is_refused(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    inputs, shard = pair
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    worker = make_worker(inputs, tmp_path / "out")
    with pytest.raises(CheckpointError, match="changed"):
        worker.run(shard)
    worker.close()
    assert files_below(tmp_path / "out") == set()


@pytest.mark.parametrize("smallest", [0, 1 << 40], ids=["mapped", "copied"])
def test_inputs_used_where_they_lie_give_the_same_bytes(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int
) -> None:
    inputs, shard = pair
    expected = make_worker(inputs, tmp_path / "expected").run(shard)
    monkeypatch.setattr(planned_windows, "MIN_MAPPED_BYTES", smallest)
    assert make_worker(inputs, tmp_path / "out").run(shard).sha256 == expected.sha256


def test_an_input_that_changes_while_it_is_used_is_refused(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = pair
    monkeypatch.setattr(planned_windows, "MIN_MAPPED_BYTES", 0)

    class Touched(LocalSource):
        """Files whose time changes once a part of them has been mapped."""

        def map_range(self, name: str, *args: Any, **options: Any) -> MappedRange:
            found = super().map_range(name, *args, **options)
            mapped.append(name)
            os.utime(Path(self.uri) / name, ns=(1, 1))
            return found

    mapped: list[str] = []
    worker = make_worker(inputs, tmp_path / "out")
    # Only one piece of it is used: whoever maps another finds out at once.
    once = shard_of(("copy", load_of(inputs["b"], "t0")))
    worker.resources.sources = {key: Touched(model.uri) for key, model in inputs.items()}
    with pytest.raises(CheckpointError, match="changed"):
        worker.run(once)
    assert len(mapped) == 1
    assert files_below(tmp_path / "out") == set()
