"""What the user of an extraction hears of its stages."""

from __future__ import annotations

import pytest

from mergekit_ray.core.errors import StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.extraction_stage import Stage
from support.merging import Events

FOLDER = ".mergekit-ray-extract/factors-0123456789abcdef"


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def stage(plan: Plan, events: Events) -> Stage:
    return Stage(events, plan, FOLDER)


@pytest.mark.parametrize("kind", ["planned", "shard_done", "checking", "publishing", "published", "already_done"])
def test_what_says_nothing_of_the_adapter_is_left_out(stage: Stage, events: Events, kind: str) -> None:
    stage.event(kind, f"/out/{FOLDER} is complete", uri=f"/out/{FOLDER}")
    assert events.all == []


def test_tensors_are_named_instead_of_shards(stage: Stage, events: Events, plan: Plan) -> None:
    shard = plan.shards[0]
    stage.event("worker_lost", f"{shard.file} is put back: gone", file=shard.file, worker="worker-0")
    name = shard.tensors[0].spec.name
    assert events.of("worker_lost") == [{"message": f"{name} is put back: gone", "file": name, "worker": "worker-0"}]


def test_what_an_earlier_run_did_is_counted(stage: Stage, events: Events) -> None:
    stage.event("resumed", "3 of 9 shards already there", num_done=3, num_shards=9)
    assert events.of("resumed")[0]["message"] == "3 of 9 tensors done by an earlier run"


def test_errors_name_tensor_and_output(stage: Stage, plan: Plan) -> None:
    shard = plan.shards[0]
    with pytest.raises(StorageError) as caught, stage.errors_told():
        raise StorageError(f"{shard.file} is full", where=f"/out/{FOLDER}")
    assert (caught.value.what, caught.value.where) == (f"{shard.tensors[0].spec.name} is full", "/out")
