"""A store that fails: what passes is absorbed, what lasts is reported, and nothing is half-published."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.operations.options import MergeOptions
from support.failures.soak import QUICK, Soak, recipe_of_five_shards, schedule_of
from support.merging import Events
from support.models import ModelLibrary
from support.servers.hostile_proxy import TRANSIENT, Schedule
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

pytestmark = pytest.mark.s3

NUM_SCHEDULES = 8
"""The first ones of those that ``benchmarks.soak`` runs, as many as it is told to."""


@pytest.fixture(scope="module")
def uploaded(s3_server: S3Server, models: ModelLibrary) -> tuple[str, dict[str, Any]]:
    """A place on the server, and a recipe of five shards over models there."""
    prefix = "s3://merges/hostile"
    return prefix, recipe_of_five_shards(Bucket(s3_server, prefix), models)


@pytest.fixture(scope="module")
def soak(s3_server: S3Server, uploaded: tuple[str, dict[str, Any]]) -> Soak:
    return Soak(s3_server, *uploaded)


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_any_schedule(seed: int, soak: Soak) -> None:
    soak.run(schedule_of(seed))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_each_fault_alone_is_absorbed(fault: str, soak: Soak) -> None:
    outcome = soak.run(Schedule(7, {fault: 0.5}))
    assert outcome.error is None
    assert outcome.counts[fault] > 5


def test_a_store_that_never_answers_right_ends_the_merge(soak: Soak, s3_environment: S3Server) -> None:
    with pytest.raises(AssertionError, match="faults that pass ended the merge") as caught:
        soak.run(Schedule(3, {"error 503": 1.0}, max_in_a_row=1000))
    assert f"after {QUICK.max_attempts} attempts: the server answered 503 (SlowDown)" in str(caught.value)
    assert "run again to resume" in str(caught.value)


def test_credentials_that_expire_on_the_way(soak: Soak) -> None:
    outcome = soak.run(Schedule(5, {}, expires_after=30))
    assert isinstance(outcome.error, StorageError)
    assert "ExpiredToken" in str(outcome.error)
    assert "log in again, and run again to resume" in str(outcome.error)


def test_an_input_that_is_replaced_on_the_way(
    uploaded: tuple[str, dict[str, Any]], s3_environment: S3Server, models: ModelLibrary
) -> None:
    prefix, recipe = uploaded
    bucket = Bucket(s3_environment, prefix)
    bucket.upload(models.get("llama", 1), "moving")
    moving = {**recipe, "models": [{**recipe["models"][0], "model": f"{prefix}/moving"}, recipe["models"][1]]}

    def replace(kind: str) -> None:
        if kind == "shard_done":
            bucket.upload(models.get("llama", 5), "moving")

    options = MergeOptions(executor="local", num_workers=1)
    with pytest.raises(CheckpointError) as caught:
        mergekit_ray.merge(moving, f"{prefix}/moved", options=options, reporter=Events(replace))
    assert f"{prefix}/moving" in str(caught.value)
    assert "model.safetensors.index.json" not in bucket.keys("moved")


def test_a_reader_sees_no_model_or_the_whole_one(
    uploaded: tuple[str, dict[str, Any]], s3_environment: S3Server, tmp_path: Path
) -> None:
    """Polled all the time while models are made, one in the other's place."""
    prefix, recipe = uploaded
    watcher = Watcher(Bucket(s3_environment, prefix), "polled")
    with watcher:
        for seed in range(3):
            options = MergeOptions(executor="local", overwrite=True)
            changed = {**recipe, "merge_method": "dare_ties", "seed": seed}
            mergekit_ray.merge(changed, f"{prefix}/polled", options=options)
    assert watcher.problems == []
    assert watcher.num_absent > 0
    assert watcher.num_whole > 0


class Watcher:
    """Reads an output again and again: the index, and the size of every shard that it names."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.problems: list[str] = []
        self.num_absent = self.num_whole = 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            index = self._bucket.read(self._name, "model.safetensors.index.json")
            if index is None:
                self.num_absent += 1
                continue
            self._look(index)

    def _look(self, index: bytes) -> None:
        import json

        manifest = self._bucket.read(self._name, "mergekit-ray.json")
        shards = {name: self._bucket.read(self._name, name) for name in set(json.loads(index)["weight_map"].values())}
        if self._bucket.read(self._name, "model.safetensors.index.json") != index:
            return  # replaced while it was read
        if manifest is None:
            self.problems.append("an index without a manifest")
            return
        self.num_whole += 1
        for shard in json.loads(manifest)["shards"]:
            data = shards[shard["file"]]
            if data is None or len(data) != shard["num_bytes"]:
                self.problems.append(f"{shard['file']}: {None if data is None else len(data)} bytes")
