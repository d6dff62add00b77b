"""Rows in another order, read from a real S3 server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.expressions import Load, gathered
from mergekit_ray.core.plan import InputFile, InputModel, Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.windows import comfortable_memory, memory_needed
from mergekit_ray.storage.opening import open_source
from mergekit_ray.worker import gathers
from support.references.rows import mapping, runs_of, taken
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.shards import big_model, load_of, make_worker, merged, shard_of

pytestmark = pytest.mark.s3

NUM_ROWS, WIDTH, NEW_ROWS = 20_000, 64, 24_000


def uploaded(bucket: Bucket, folder: Path, *tensors: torch.Tensor) -> tuple[InputModel, list[Load]]:
    """A model in the bucket, and its tensors."""
    local = big_model(folder, *tensors)
    source = open_source(bucket.upload(folder, folder.name))
    stat = source.stat("model.safetensors")
    assert stat is not None
    file = InputFile(stat.name, stat.num_bytes, stat.version)
    loads = [load_of(local, f"t{i}") for i in range(len(tensors))]
    return InputModel(local.key, local.reference, source.uri, {stat.name: file}), loads


@pytest.fixture
def bucket(s3_server: S3Server, s3_prefix: str) -> Bucket:
    return Bucket(s3_server, s3_prefix)


@pytest.mark.parametrize("budget_of", [memory_needed, comfortable_memory], ids=["least", "comfortable"])
@pytest.mark.parametrize("span_bytes", [1 << 12, 2 << 20])
def test_scattered_rows(
    bucket: Bucket, tmp_path: Path, budget_of: Callable[[Plan], int], span_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathers, "SPAN_BYTES", span_bytes)
    monkeypatch.setattr(gathers, "_MIN_DIRECT_BYTES", 1 << 12)
    x = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model, [load] = uploaded(bucket, tmp_path / "model", x)
    spec = TensorSpec("new", DType.BF16, (NEW_ROWS, WIDTH))
    wanted = [mapping(seed, [NUM_ROWS], NEW_ROWS) for seed in range(2)]
    leaves = [gathered([load], spec, runs_of(each)) for each in wanted]
    shard = shard_of(("copied", leaves[0]), ("merged", merged("merged", *leaves)))
    plan = Plan({model.key: model}, (shard,), {}, (), {}, 0)
    worker = make_worker({model.key: model}, tmp_path / "out", memory_bytes=budget_of(plan))
    worker.run(shard)
    worker.close()
    found = load_file(tmp_path / "out" / shard.file)
    first, second = (taken([x], each, spec.shape) for each in wanted)
    assert torch.equal(found["copied"], first)
    mean = (first.double() + 2 * second.double()) / 3
    assert (found["merged"].double() - mean).abs().le(mean.abs() * 2.0**-8 * 1.001 + 1e-6).all()


def test_a_file_that_is_shorter_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    x = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model, [load] = uploaded(bucket, tmp_path / "model", x)
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(content[:-1000])
    stat = open_source(bucket.upload(tmp_path / "model", "model")).stat("model.safetensors")
    assert stat is not None
    [file] = model.files.values()
    told = replace(model, files={file.name: replace(file, version=stat.version)})
    spec = TensorSpec("new", DType.BF16, (NUM_ROWS, WIDTH))
    gather = gathered([load], spec, runs_of([(0, NUM_ROWS - 1 - row) for row in range(NUM_ROWS)]))
    for each, message in ((told, "ends before byte"), (model, "changed")):
        worker = make_worker({each.key: each}, tmp_path / "out")
        with pytest.raises(CheckpointError, match=message):
            worker.run(shard_of(("w", gather)))
        worker.close()
    assert not any((tmp_path / "out").rglob("*.safetensors"))
