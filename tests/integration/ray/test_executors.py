"""Every executor does the same: the same bytes, the same way with lost workers, interrupts and wrong inputs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import Interrupted, MergeError, PlanError, StorageError
from mergekit_ray.executors.driver import Job, run_shards
from mergekit_ray.executors.watch import SECONDS_VARIABLE
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.planning.windows import memory_needed
from mergekit_ray.worker.resources import WorkerOptions
from support.merging import Background, Events, recipe_of, stop_at, undisturbed
from support.models import ModelLibrary, contents, rewrite, tensors_of
from support.servers.ray_cluster import RayCluster, freeze
from support.waiting import wait_until

METHODS = ["linear", "slerp", "ties", "dare_ties"]
NAN_TENSOR = "model.layers.2.mlp.up_proj.weight"

EXECUTORS = [
    pytest.param(("local", 1), id="local-1"),
    pytest.param(("local", 4), id="local-4"),
    pytest.param(("ray", 2), id="ray-2", marks=pytest.mark.ray),
]
CHUNKS = [1 << 10, 1 << 16, 1000]
# Starting actors takes seconds: on Ray each number of workers meets each chunk size with one method or another.
SAME_BYTES = [("local", workers, chunk, method) for workers in (1, 4) for chunk in CHUNKS for method in METHODS]
SAME_BYTES += [
    ("ray", 2, 1000, "linear"),
    ("ray", 1, 1 << 10, "slerp"),
    ("ray", 2, 1 << 16, "slerp"),
    ("ray", 2, 1 << 10, "ties"),
    ("ray", 1, 1000, "dare_ties"),
    ("ray", 2, 1 << 16, "dare_ties"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A Ray of two nodes with one CPU each."""
    with RayCluster(num_nodes=2) as running:
        yield running


@pytest.fixture
def options(request: pytest.FixtureRequest) -> MergeOptions:
    """What an indirect parameter (executor, workers) means."""
    executor, num_workers = request.param
    if executor == "ray":
        request.getfixturevalue("cluster")
    return MergeOptions(executor=executor, num_workers=num_workers)


@pytest.fixture(scope="module")
def recipe(models: ModelLibrary) -> Callable[[str], dict[str, Any]]:
    """A recipe by method: several shards, and an embedding of more elements than the largest chunk."""
    shape: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 48, "dtype": torch.bfloat16}
    base, *tuned = (models.get("llama", variant, **shape) for variant in range(3))

    def make(method: str) -> dict[str, Any]:
        return recipe_of(method, base, tuned, output={"max_shard_size": 100_000}, seed=7)

    return make


@pytest.fixture(scope="module")
def expected(
    recipe: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """All files of a merge with everything at its default, by method."""
    folder = tmp_path_factory.mktemp("expected")

    def make(method: str) -> dict[str, bytes]:
        if not (folder / method).exists():
            mergekit_ray.merge(recipe(method), folder / method, options=MergeOptions(executor="local"))
        return contents(folder / method)

    return make


@pytest.fixture(scope="module")
def many(models: ModelLibrary) -> dict[str, Any]:
    """A recipe of over a hundred shards, which takes long enough to be interrupted."""
    base, *tuned = (models.get("llama", variant, num_layers=12) for variant in range(3))
    return recipe_of("ties", base, tuned, output={"max_shard_size": 1})


@pytest.fixture(scope="module")
def many_expected(many: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(many, tmp_path_factory.mktemp("many") / "out")


class TestSameBytes:
    @pytest.mark.parametrize(
        ("executor", "num_workers", "chunk_elements", "method"),
        [pytest.param(*case, marks=[pytest.mark.ray] if case[0] == "ray" else []) for case in SAME_BYTES],
    )
    def test_for_every_executor_number_of_workers_and_chunk_size(
        self,
        executor: Any,
        num_workers: int,
        chunk_elements: int,
        method: str,
        recipe: Callable[[str], dict[str, Any]],
        expected: Callable[[str], dict[str, bytes]],
        tmp_path: Path,
        request: pytest.FixtureRequest,
    ) -> None:
        if executor == "ray":
            request.getfixturevalue("cluster")
        options = MergeOptions(executor=executor, num_workers=num_workers, chunk_elements=chunk_elements)
        result = mergekit_ray.merge(recipe(method), tmp_path / "out", options=options)
        assert len(result.plan.shards) > 4
        assert_same(contents(tmp_path / "out"), expected(method))

    @pytest.mark.parametrize("method", METHODS)
    def test_for_the_least_memory(
        self,
        method: str,
        recipe: Callable[[str], dict[str, Any]],
        expected: Callable[[str], dict[str, bytes]],
        tmp_path: Path,
    ) -> None:
        least = memory_needed(mergekit_ray.plan(recipe(method)))
        options = MergeOptions(executor="local", memory_bytes=least, num_workers=2)
        mergekit_ray.merge(recipe(method), tmp_path / "out", options=options)
        assert_same(contents(tmp_path / "out"), expected(method))
        with pytest.raises(PlanError, match="too small"):
            mergekit_ray.merge(
                recipe(method), tmp_path / "no", options=MergeOptions(executor="local", memory_bytes=least - 1)
            )
        assert not (tmp_path / "no").exists()

    def test_another_seed_gives_other_bytes_where_there_is_chance(
        self, recipe: Callable[[str], dict[str, Any]], tmp_path: Path
    ) -> None:
        for method, differs in [("dare_ties", True), ("ties", False)]:
            for seed in (1, 2):
                mergekit_ray.merge(recipe(method), tmp_path / f"{method}-{seed}", seed=seed)
            first, second = (tensors_of(tmp_path / f"{method}-{seed}") for seed in (1, 2))
            assert any(not torch.equal(first[name], second[name]) for name in first) is differs


@pytest.mark.parametrize("options", EXECUTORS, indirect=True)
class TestWrongInput:
    def test_nan_names_tensor_and_model_and_nothing_is_published(
        self, options: MergeOptions, models: ModelLibrary, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad"
        shutil.copytree(models.get("llama", 1), bad)
        spoilt = tensors_of(bad)[NAN_TENSOR]
        spoilt[3, 5] = float("nan")
        rewrite(bad, {NAN_TENSOR: spoilt})
        recipe = recipe_of("linear", models.get("llama"), [bad], output={"max_shard_size": 1})
        with pytest.raises(MergeError) as caught:
            mergekit_ray.merge(recipe, tmp_path / "out", options=options)
        assert caught.value.exit_code == 3
        message = str(caught.value)
        assert NAN_TENSOR in message
        assert str(bad) in message
        assert f"flat index {3 * 32 + 5}" in message
        left = contents(tmp_path / "out")
        assert not left.keys() & {"config.json", "model.safetensors.index.json", "mergekit-ray.json", "README.md"}
        # What is there is whole: shards with their records, and nothing half-written.
        shards = {name for name in left if name.endswith(".safetensors")}
        [folder] = {name.rpartition("/")[0] for name in left if name.startswith(".mergekit-ray/")}
        records = {f"{folder}/{name}.json" for name in shards}
        assert {name for name in left if name not in shards and not name.endswith("plan.json")} == records


@pytest.mark.parametrize("options", EXECUTORS, indirect=True)
class TestResume:
    def test_a_stopped_merge_is_finished_by_the_next(
        self, options: MergeOptions, many: dict[str, Any], many_expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        out, stop = tmp_path / "out", threading.Event()
        with pytest.raises(Interrupted) as caught:
            mergekit_ray.merge(many, out, options=options, stop=stop, reporter=stop_at(stop, "shard_done"))
        assert caught.value.exit_code == 130
        before = contents(out)
        assert "model.safetensors.index.json" not in before
        done = {Path(name).name.removesuffix(".json") for name in before if name.endswith(".safetensors.json")}
        assert 1 <= len(done) < 100
        # An abandoned shard leaves nothing behind.
        assert {name for name in before if "/" not in name} == done
        times = {name: (out / name).stat().st_mtime_ns for name in done}
        events = Events()
        result = mergekit_ray.merge(many, out, options=options, reporter=events)
        assert result.num_resumed == len(done)
        assert {fields["file"] for fields in events.of("shard_done")} == {
            shard.file for shard in result.plan.shards
        } - done
        assert {name: (out / name).stat().st_mtime_ns for name in done} == times
        assert_same(contents(out), many_expected)

    def test_a_finished_merge_is_left_alone(
        self, options: MergeOptions, recipe: Callable[[str], dict[str, Any]], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        mergekit_ray.merge(recipe("linear"), out, options=MergeOptions(executor="local"))
        times = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
        events = Events()
        mergekit_ray.merge(recipe("linear"), out, options=options, reporter=events)
        assert [kind for kind, _ in events.all] == ["planned", "already_done"]
        assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == times


class TestTakenPlace:
    def test_shards_that_were_lost_or_damaged_since_are_written_again(
        self, many: dict[str, Any], many_expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        out, stop = tmp_path / "out", threading.Event()
        with pytest.raises(Interrupted):
            mergekit_ray.merge(many, out, stop=stop, reporter=stop_at(stop, "shard_done", times=4))
        removed, cut, *_ = sorted(out.glob("*.safetensors"))
        removed.unlink()
        cut.write_bytes(cut.read_bytes()[:-1])
        events = Events()
        mergekit_ray.merge(many, out, reporter=events)
        assert {removed.name, cut.name} <= {fields["file"] for fields in events.of("shard_done")}
        assert_same(contents(out), many_expected)

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_another_plan_is_refused_and_what_is_there_stays(
        self, is_finished: bool, many: dict[str, Any], models: ModelLibrary, tmp_path: Path
    ) -> None:
        out, stop = tmp_path / "out", threading.Event()
        if is_finished:
            mergekit_ray.merge(many, out)
        else:
            with pytest.raises(Interrupted):
                mergekit_ray.merge(many, out, stop=stop, reporter=stop_at(stop, "shard_done"))
        before = contents(out)
        with pytest.raises(PlanError) as caught:
            mergekit_ray.merge(recipe_of("linear", models.get("llama"), [models.get("llama", 1)]), out)
        assert caught.value.exit_code == 2
        assert str(out) in str(caught.value)
        assert "`options=MergeOptions(overwrite=True)`" in str(caught.value)
        assert contents(out) == before

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_overwrite_leaves_nothing_of_the_old_model(
        self, is_finished: bool, models: ModelLibrary, tmp_path: Path
    ) -> None:
        donor = tmp_path / "donor"
        shutil.copytree(models.get("llama", with_tokenizer=True), donor)
        for name in ("modeling_custom.py", "chat_template.jinja", "LICENSE", "preprocessor_config.json"):
            (donor / name).write_text("{}")
        out, stop = tmp_path / "out", threading.Event()
        old = recipe_of("linear", donor, [models.get("llama", 1)], output={"max_shard_size": 1})
        if is_finished:
            mergekit_ray.merge(old, out)
        else:
            with pytest.raises(Interrupted):
                mergekit_ray.merge(old, out, stop=stop, reporter=stop_at(stop, "shard_done"))
        (out / "notes.txt").write_text("of the user")
        new = recipe_of("linear", models.get("llama", 2), [models.get("llama", 1)])
        mergekit_ray.merge(new, out, options=MergeOptions(overwrite=True))
        mergekit_ray.merge(new, tmp_path / "fresh")
        assert contents(out).pop("notes.txt") == b"of the user"
        (out / "notes.txt").unlink()
        assert_same(contents(out), contents(tmp_path / "fresh"))

    def test_an_input_is_never_written_to(self, models: ModelLibrary, tmp_path: Path) -> None:
        source = tmp_path / "source"
        shutil.copytree(models.get("llama"), source)
        before = contents(source)
        recipe = recipe_of("linear", source, [models.get("llama", 1)])
        for place in (source, Path(f"{source}/../source")):
            with pytest.raises(PlanError, match="one of the inputs"):
                mergekit_ray.merge(recipe, place, options=MergeOptions(overwrite=True))
        assert contents(source) == before


@pytest.mark.ray
@pytest.mark.slow
class TestLostWorkers:
    """A worker that is frozen holds its shard, so the merge cannot end before the test has done its worst."""

    @pytest.fixture(autouse=True)
    def nobody_else(self, cluster: RayCluster) -> None:
        """The workers of the test before have gone."""
        wait_until(lambda: not cluster.workers())

    def test_killed_actor(
        self, cluster: RayCluster, many: dict[str, Any], many_expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        running = Background(many, tmp_path / "out", MergeOptions(executor="ray", num_workers=2))
        victim = wait_until(lambda: running.events.of("shard_done") and busy(cluster))[0]
        freeze(victim)
        # All else is done by the other worker (or waits, if the frozen one is the only one yet).
        wait_until(lambda: len(written(tmp_path / "out")) > 20)
        assert running.is_running
        victim.kill()
        running.result()
        assert len(running.events.of("worker_lost")) >= 1
        assert_same(contents(tmp_path / "out"), many_expected)

    def test_stopped_actor(
        self,
        cluster: RayCluster,
        many: dict[str, Any],
        many_expected: dict[str, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nobody kills it but the driver, which then has its shard done by another."""
        monkeypatch.setenv(SECONDS_VARIABLE, "10")
        running = Background(many, tmp_path / "out", MergeOptions(executor="ray", num_workers=2))
        victim = wait_until(lambda: running.events.of("shard_done") and busy(cluster))[0]
        freeze(victim)
        running.result()
        for kind in ("worker_stalled", "worker_given_up"):
            assert any(f"process {victim.pid}," in event["worker"] for event in running.events.of(kind))
        assert_same(contents(tmp_path / "out"), many_expected)
        wait_until(lambda: not victim.is_running())

    def test_removed_node(
        self, cluster: RayCluster, many: dict[str, Any], many_expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        doomed = cluster.add_node()
        running = Background(many, tmp_path / "out", MergeOptions(executor="ray", num_workers=3))
        try:
            [victim] = wait_until(lambda: busy(cluster, doomed))
            wait_until(lambda: running.events.of("shard_done"))
            freeze(victim)
        finally:
            cluster.remove_node(doomed)
        running.result()
        assert_same(contents(tmp_path / "out"), many_expected)

    def test_workers_of_another_version_are_refused(
        self, cluster: RayCluster, many: dict[str, Any], tmp_path: Path
    ) -> None:
        from mergekit_ray.executors.ray_cluster import Cluster
        from mergekit_ray.executors.ray_executor import RayExecutor

        plan = mergekit_ray.plan(many)
        job = Job(plan.inputs, str(tmp_path / "out"), "records", WorkerOptions(memory_needed(plan)))
        executor = RayExecutor(Cluster(), version="9.8.7")
        with pytest.raises(StorageError, match=r"the driver runs mergekit-ray 9\.8\.7, and this node has "):
            run_shards(plan.shards, job, executor, Events(), threading.Event())
        assert written(tmp_path / "out") == []

    def test_added_node_joins_in(
        self, cluster: RayCluster, many: dict[str, Any], many_expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        running = Background(many, tmp_path / "out", MergeOptions(executor="ray"))
        # One after the other: alone, the first could end the merge before the second is up.
        frozen: list[psutil.Process] = []
        while len(frozen) < 2:
            frozen.append(wait_until(lambda: [process for process in busy(cluster) if process not in frozen])[0])
            freeze(frozen[-1])
        num_done = len(written(tmp_path / "out"))
        node = cluster.add_node()
        try:
            # Nobody but a worker on the new node can have written these.
            wait_until(lambda: len(written(tmp_path / "out")) > num_done + 3)
            for process in frozen:
                process.resume()
            running.result()
        finally:
            cluster.remove_node(node)
        # Those that were frozen for long may have been helped out, and given up; no other was lost.
        lost = {event["worker"] for event in running.events.of("worker_lost")}
        assert all(any(f"process {process.pid}," in name for process in frozen) for name in lost)
        assert_same(contents(tmp_path / "out"), many_expected)


def busy(cluster: RayCluster, node: Any = None) -> list[psutil.Process]:
    """Workers that were given a shard a moment ago: Ray titles a process after the call that began last."""
    titles = {process: " ".join(process.cmdline()) for process in cluster.workers(node)}
    return [process for process, title in titles.items() if "RayWorker.run" in title or "RayWorker.has_read" in title]


def written(out: Path) -> list[Path]:
    return list(out.glob("*.safetensors"))


def assert_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """All files, with all their bytes; names what differs instead of printing it."""
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
