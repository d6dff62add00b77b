"""What may be at the output, and what is done about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.output.destination import (
    INDEX_FILE,
    LEASE_FILE,
    MANIFEST_FILE,
    RECORD_ROOT,
    STAGED,
    SWAP_FILE,
    clear,
    clear_notes,
    discard_attempts,
    inspect,
)
from mergekit_ray.output.publish import publish
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.local.upload import temporary_for
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker
from support.manifests import edit_manifest, make_old
from support.models import contents


@pytest.fixture
def sink(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


def write_shards(plan: Plan, sink: LocalStore, num_shards: int | None = None) -> dict[str, ShardRecord]:
    folder = f"{RECORD_ROOT}/{plan.digest}"
    resources = Resources(plan.inputs, open_sources(plan.inputs), WorkerOptions(FIXED_BYTES + (1 << 20)))
    worker = Worker(resources, sink, folder)
    try:
        return {shard.file: worker.run(shard) for shard in plan.shards[:num_shards]}
    finally:
        worker.close()


def publish_all(plan: Plan, sink: LocalStore) -> None:
    records = write_shards(plan, sink)
    publish(plan, inspect(sink, plan, overwrite=False), records, open_sources(plan.inputs))
    clear_notes(sink)


def names(sink: LocalStore) -> set[str]:
    return {stat.name for stat in sink.list()}


def test_an_empty_place(plan: Plan, sink: LocalStore) -> None:
    found = inspect(sink, plan, overwrite=False)
    assert (dict(found.done), found.published) == ({}, False)
    assert found.record_folder == f".mergekit-ray/{plan.digest}"
    assert names(sink) == set()


def test_unfinished_work_is_resumed(plan: Plan, sink: LocalStore) -> None:
    records = write_shards(plan, sink, 2)
    sink.put(f"{RECORD_ROOT}/{plan.digest}/plan.json", json.dumps({"plan_digest": plan.digest}).encode())
    sink.put("config.json", b"{}")
    before = names(sink)
    found = inspect(sink, plan, overwrite=False)
    assert (dict(found.done), found.published) == (records, False)
    assert names(sink) == before


def test_a_shard_without_its_file_or_with_another_is_done_again(plan: Plan, sink: LocalStore) -> None:
    records = write_shards(plan, sink)
    first, second, third = plan.shards
    sink.delete([first.file])
    sink.put(second.file, b"short")
    assert set(inspect(sink, plan, overwrite=False).done) == {third.file}
    data = sink.read(third.file, max_bytes=1 << 20)
    sink.put(third.file, bytes(len(data)))  # as long, but of another time
    assert inspect(sink, plan, overwrite=False).done == {}
    assert len(records) == 3


def test_what_is_left_of_attempts_at_a_shard_and_its_record_goes(plan: Plan, sink: LocalStore) -> None:
    """A worker that was killed in between leaves a file that it was writing; those of other shards are not touched."""
    first, second, _ = plan.shards
    write_shards(plan, sink, 1)
    before = contents(Path(sink.uri))
    found = inspect(sink, plan, overwrite=False)
    for name in (first.file, f"{found.record_folder}/{first.file}.json", f"{found.record_folder}/{second.file}.json"):
        temporary_for(Path(sink.uri) / name).write_bytes(b"half")
    discard_attempts(found, [first.file])
    [left] = contents(Path(sink.uri)).keys() - before.keys()
    assert left.startswith(f"{found.record_folder}/.{second.file}.json.")
    assert contents(Path(sink.uri)).items() > before.items()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"file": "x"}', b'{"file": 3, "num_bytes": []}', b"\xff"])
def test_a_damaged_record_means_the_shard_is_done_again(plan: Plan, sink: LocalStore, damage: bytes) -> None:
    write_shards(plan, sink, 2)
    sink.put(f"{RECORD_ROOT}/{plan.digest}/{plan.shards[0].file}.json", damage)
    assert set(inspect(sink, plan, overwrite=False).done) == {plan.shards[1].file}


def test_a_published_model_is_found(plan: Plan, sink: LocalStore) -> None:
    publish_all(plan, sink)
    found = inspect(sink, plan, overwrite=False)
    assert found.published
    assert set(found.done) == {shard.file for shard in plan.shards}


@pytest.mark.parametrize("lost", [INDEX_FILE, "shard"])
def test_a_published_model_with_something_missing_is_not_done(plan: Plan, sink: LocalStore, lost: str) -> None:
    publish_all(plan, sink)
    sink.delete([plan.shards[0].file if lost == "shard" else lost])
    found = inspect(sink, plan, overwrite=False)
    assert not found.published


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_files_beside_the_shards_that_are_gone_are_published_again(
    plan: Plan, sink: LocalStore, name: str, is_cut: bool
) -> None:
    options = MergeOptions(executor="local")
    run_plan(plan, sink.uri, options)
    before = contents(Path(sink.uri))
    shards = {shard.file: sink.stat(shard.file) for shard in plan.shards}
    if is_cut:
        sink.put(name, before[name][:-1])
    else:
        sink.delete([name])
    assert not inspect(sink, plan, overwrite=False).is_complete
    result = run_plan(plan, sink.uri, options)
    assert result.num_resumed == len(plan.shards)
    assert {shard.file: sink.stat(shard.file) for shard in plan.shards} == shards, "none was made again"
    assert contents(Path(sink.uri)) == before
    assert inspect(sink, plan, overwrite=False).published


def test_an_edited_card_stays(plan: Plan, sink: LocalStore) -> None:
    publish_all(plan, sink)
    sink.put("README.md", b"mine")
    assert inspect(sink, plan, overwrite=False).published


@pytest.mark.parametrize("files", [3, ["x"], {"config.json": 3}, {"config.json": {}}])
def test_a_list_of_files_that_is_none_is_published_again(plan: Plan, sink: LocalStore, files: object) -> None:
    publish_all(plan, sink)
    edit_manifest(Path(sink.uri), lambda found: found.update(files=files))
    assert not inspect(sink, plan, overwrite=False).is_complete


def test_a_manifest_of_an_earlier_version_will_do(plan: Plan, sink: LocalStore) -> None:
    publish_all(plan, sink)
    make_old(Path(sink.uri))
    assert inspect(sink, plan, overwrite=False).published


def test_another_plan_is_in_the_way(plan: Plan, sink: LocalStore) -> None:
    publish_all(plan, sink)
    before = names(sink)
    other = replace(plan, seed=99)
    with pytest.raises(PlanError, match="this recipe's output with seed 0 is there, and the seed is 99 now") as caught:
        inspect(sink, other, overwrite=False)
    assert caught.value.where == sink.uri
    assert "`options=MergeOptions(overwrite=True)`" in str(caught.value)
    assert names(sink) == before
    found = inspect(sink, other, overwrite=True)
    assert (found.published, dict(found.done)) == (False, {})
    # It is a model: it stays until the other is whole.
    assert found.staging == f"{RECORD_ROOT}/{other.digest}/{STAGED}"
    assert (set(found.clear_first), set(found.clear_last)) == (set(), before)
    assert names(sink) == before


def test_another_plans_unfinished_work_is_in_the_way(plan: Plan, sink: LocalStore) -> None:
    write_shards(plan, sink, 1)
    other = replace(plan, seed=99)
    with pytest.raises(PlanError, match=r"other files are there already: .*model-00001-of-.*safetensors"):
        inspect(sink, other, overwrite=False)
    found = inspect(sink, other, overwrite=True)
    # It is none yet, and would never become one: it makes room at once.
    assert (set(found.clear_first), found.clear_last, found.staging) == (names(sink), (), None)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model-00001-of-00002.bin", "model-7.gguf", "config.json", "adapter_config.json"],
)
def test_a_foreign_model_is_in_the_way(plan: Plan, sink: LocalStore, name: str) -> None:
    sink.put(name, b"x")
    with pytest.raises(PlanError, match=name):
        inspect(sink, plan, overwrite=False)


def test_foreign_weights_beside_unfinished_work_are_in_the_way(plan: Plan, sink: LocalStore) -> None:
    done = write_shards(plan, sink, 1)
    sink.put("model.safetensors", b"x")
    with pytest.raises(PlanError, match=r"model\.safetensors"):
        inspect(sink, plan, overwrite=False)
    found = inspect(sink, plan, overwrite=True)
    assert set(found.done) == set(done)
    assert (found.clear_first, found.clear_last, found.staging) == ((), ("model.safetensors",), None)


def test_files_of_other_kinds_are_left_alone(plan: Plan, sink: LocalStore) -> None:
    for name in ("notes.md", "data/train.jsonl", "runs/config.json"):
        sink.put(name, b"x")
    sink.put("model.safetensors", b"x")
    found = inspect(sink, plan, overwrite=True)
    assert (found.clear_first, found.clear_last) == ((), ("model.safetensors",))


@pytest.mark.parametrize("manifest", [b"not json", b"[1]", b'{"plan_digest": "other"}'])
def test_a_manifest_that_is_not_ours_is_something_else(plan: Plan, sink: LocalStore, manifest: bytes) -> None:
    sink.put(MANIFEST_FILE, manifest)
    with pytest.raises(PlanError, match=MANIFEST_FILE):
        inspect(sink, plan, overwrite=False)
    assert inspect(sink, plan, overwrite=True).clear_last == (MANIFEST_FILE,)


class Recording(LocalStore):
    """Remembers what was deleted, call by call."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.deleted: list[list[str]] = []

    def delete(self, names: Sequence[str]) -> None:
        self.deleted.append(list(names))
        super().delete(names)


def test_the_index_of_the_old_model_goes_before_its_weights_and_the_manifest_last(tmp_path: Path) -> None:
    sink = Recording(tmp_path / "out")
    files = ["a.safetensors", "config.json", INDEX_FILE, MANIFEST_FILE, "z.safetensors"]
    for name in files:
        sink.put(name, b"x")
    clear(sink, files)
    assert sink.deleted == [[INDEX_FILE], ["a.safetensors", "config.json", "z.safetensors"], [MANIFEST_FILE]]


def test_a_lease_is_in_nobodys_way(plan: Plan, sink: LocalStore) -> None:
    sink.put(LEASE_FILE, b"{}")
    found = inspect(sink, plan, overwrite=False)
    assert (dict(found.done), found.staging, found.clear_first, found.clear_last) == ({}, None, (), ())
    clear_notes(sink)
    assert names(sink) == {LEASE_FILE}


def test_a_complete_model_with_notes_beside_it_is_to_be_tidied_up(plan: Plan, sink: LocalStore) -> None:
    publish_all(plan, sink)
    sink.put(f"{RECORD_ROOT}/{plan.digest}/plan.json", b"{}")
    found = inspect(sink, plan, overwrite=False)
    assert (found.is_complete, found.published) == (True, False)


class TestStaged:
    """Made beside an old model."""

    @pytest.fixture
    def old(self, sink: LocalStore) -> set[str]:
        for name in ("model.safetensors", "config.json"):
            sink.put(name, b"old")
        return names(sink)

    def test_its_shards_are_resumed(self, plan: Plan, sink: LocalStore, old: set[str]) -> None:
        place = inspect(sink, plan, overwrite=True)
        stage = LocalStore(f"{sink.uri}/{place.staging}")
        done = write_shards(plan, stage, 2)
        with pytest.raises(PlanError, match=r"other files are there already: config\.json, model\.safetensors"):
            inspect(sink, plan, overwrite=False)
        found = inspect(sink, plan, overwrite=True)
        assert (dict(found.done), found.staging, set(found.clear_last)) == (done, place.staging, old)

    def test_the_unfinished_one_of_another_plan_stays_until_ours_is_whole(
        self, plan: Plan, sink: LocalStore, old: set[str]
    ) -> None:
        write_shards(plan, LocalStore(f"{sink.uri}/{inspect(sink, plan, overwrite=True).staging}"), 1)
        found = inspect(sink, replace(plan, seed=99), overwrite=True)
        assert (found.clear_first, set(found.clear_last)) == ((), names(sink))

    def test_a_whole_one_is_a_model_even_with_nothing_beside_it(self, plan: Plan, sink: LocalStore) -> None:
        publish_all(plan, LocalStore(f"{sink.uri}/{RECORD_ROOT}/{plan.digest}/{STAGED}"))
        other = replace(plan, seed=99)
        found = inspect(sink, other, overwrite=True)
        assert found.staging == f"{RECORD_ROOT}/{other.digest}/{STAGED}"
        assert (found.clear_first, set(found.clear_last)) == ((), names(sink))

    def test_a_swap_that_has_begun_goes_on_unasked(self, plan: Plan, sink: LocalStore, old: set[str]) -> None:
        sink.put(f"{RECORD_ROOT}/{plan.digest}/{SWAP_FILE}", b"{}")
        found = inspect(sink, plan, overwrite=False)
        assert found.staging == f"{RECORD_ROOT}/{plan.digest}/{STAGED}"
        with pytest.raises(PlanError, match="other files are there already"):
            inspect(sink, replace(plan, seed=99), overwrite=False)


class Fixed(LocalStore):
    """A store that cannot move files."""

    move = None  # type: ignore[assignment] # what makes it none of `MovingSink`


def test_where_files_cannot_be_moved_the_old_model_goes_first(plan: Plan, tmp_path: Path) -> None:
    sink = Fixed(tmp_path / "out")
    sink.put("model.safetensors", b"old")
    found = inspect(sink, plan, overwrite=True)
    assert (found.staging, found.clear_first, found.clear_last) == (None, ("model.safetensors",), ())


def test_an_input_is_never_the_output(plan: Plan, models: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(models[1])
    for place in (models[0], link):
        with pytest.raises(PlanError, match="the output is one of the inputs"):
            inspect(LocalStore(place), plan, overwrite=True)
    assert (models[1] / "model.safetensors").exists()
