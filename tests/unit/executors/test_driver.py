"""The driver's policy, against an executor whose faults are written in a script."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import pytest

from mergekit_ray.core.errors import Interrupted, MergeError, MergekitRayError, StorageError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.executors.driver import MAX_ATTEMPTS, MAX_LOSSES, Job, Outcome, run_shards
from mergekit_ray.executors.watch import Standing
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.signals import GRACE_SECONDS
from support.driving import JOB, Notes, Rules, shard

LOST = "lost"


class ScriptedExecutor:
    """Ends each attempt at a shard as the script says: an error, `LOST`, or (when the script is used up) a record.

    Args:
        script: what happens to a shard's attempts, in order.
        num_workers: shards in work at a time.
        hold: shards that end only when the driver asks to stop.
        at_once: how many ends the driver hears of at a time.
    """

    def __init__(
        self,
        script: dict[str, list[MergekitRayError | str]],
        *,
        num_workers: int = 1,
        hold: Sequence[str] = (),
        at_once: int = 1,
    ) -> None:
        self.script = {file: deque(ends) for file, ends in script.items()}
        self.num_workers = num_workers
        self.hold = set(hold)
        self.at_once = at_once
        self.submitted: list[str] = []
        self.calls: list[str] = []
        self.running: list[str] = []
        self.most_running = 0
        self.is_stopped = False

    def start(self, job: Job, num_shards: int) -> None:
        assert job is JOB
        self.calls.append(f"start {num_shards}")

    def idle(self) -> int:
        return self.num_workers - len(self.running)

    def submit(self, shard: Shard) -> None:
        assert self.idle() > 0
        self.submitted.append(shard.file)
        self.running.append(shard.file)
        self.most_running = max(self.most_running, len(self.running))

    def wait(self, seconds: float) -> Sequence[Outcome]:
        ready = [file for file in self.running if self.is_stopped or file not in self.hold][: self.at_once]
        self.running = [file for file in self.running if file not in ready]
        return [self._end(file) for file in ready]

    def progress(self, *, settled: bool = False) -> Progress:
        return Progress(num_tensors=len(self.submitted))

    def standings(self) -> Sequence[Standing]:
        return []

    def give_up(self, worker: str) -> None:
        self.calls.append(f"give up {worker}")

    def has_spare(self) -> bool:
        return False

    def stop(self) -> None:
        self.is_stopped = True
        self.calls.append("stop")

    def close(self) -> None:
        self.calls.append("close")

    def _end(self, file: str) -> Outcome:
        if self.is_stopped and file in self.hold:
            return Outcome(file, "w", error=Interrupted("stopped"))
        script = self.script.get(file)
        end = script.popleft() if script else None
        if isinstance(end, MergekitRayError):
            return Outcome(file, "w", error=end)
        if end == LOST:
            return Outcome(file, "w", error=StorageError("worker 1 was lost"), lost=True)
        return Outcome(file, "w", record=ShardRecord(file, 1, "0" * 64, {}))


def run(
    executor: ScriptedExecutor, shards: Sequence[Shard], notes: Notes | None = None, stop: threading.Event | None = None
) -> dict[str, ShardRecord]:
    return run_shards(shards, JOB, executor, notes or Notes(), stop or threading.Event())


def test_all_shards_are_run_once_largest_first() -> None:
    executor, notes = ScriptedExecutor({}), Notes()
    records = run(executor, [shard("a", 10), shard("b", 30), shard("c", 20), shard("d", 30)], notes)
    assert executor.submitted == ["b", "d", "c", "a"]
    assert set(records) == {"a", "b", "c", "d"}
    assert executor.calls == ["start 4", "close"]
    assert notes.seen[-1] == (4, 4)


def test_every_worker_is_kept_busy_and_none_is_given_two() -> None:
    executor = ScriptedExecutor({}, num_workers=3)
    run(executor, [shard(str(i)) for i in range(7)])
    assert executor.most_running == 3


def test_shard_of_a_lost_worker_is_put_back() -> None:
    executor, notes = ScriptedExecutor({"a": [LOST, LOST]}, num_workers=2), Notes()
    records = run(executor, [shard("a"), shard("b")], notes)
    assert set(records) == {"a", "b"}
    assert executor.submitted.count("a") == 3
    assert executor.submitted.count("b") == 1
    assert notes.events.count(("worker_lost", "a")) == 2


def test_shard_that_keeps_losing_its_workers_ends_the_merge() -> None:
    executor = ScriptedExecutor({"a": [LOST] * (MAX_LOSSES + 5)})
    with pytest.raises(StorageError, match="was lost"):
        run(executor, [shard("a")])
    assert len(executor.submitted) == MAX_LOSSES + 1


@pytest.mark.parametrize("num_faults", range(1, MAX_ATTEMPTS))
def test_error_that_may_pass_is_tried_again(num_faults: int) -> None:
    executor, notes = ScriptedExecutor({"a": [StorageError("busy")] * num_faults}), Notes()
    assert set(run(executor, [shard("a")], notes)) == {"a"}
    assert len(executor.submitted) == num_faults + 1
    assert notes.events == [("shard_retried", "a")] * num_faults + [("shard_done", "a")]


def test_error_that_may_pass_is_raised_when_it_does_not() -> None:
    faults: list[MergekitRayError | str] = [StorageError(f"busy {i}") for i in range(MAX_ATTEMPTS + 2)]
    executor = ScriptedExecutor({"a": faults})
    with pytest.raises(StorageError, match=f"busy {MAX_ATTEMPTS - 1}"):
        run(executor, [shard("a")])
    assert len(executor.submitted) == MAX_ATTEMPTS == 3


def test_lost_workers_do_not_use_up_the_tries_of_a_shard() -> None:
    ends: list[MergekitRayError | str] = [LOST, StorageError("busy"), LOST, StorageError("busy"), LOST]
    executor = ScriptedExecutor({"a": ends})
    assert set(run(executor, [shard("a")])) == {"a"}
    assert len(executor.submitted) == 6


def test_error_that_will_not_pass_ends_the_merge_at_once_and_abandons_the_rest() -> None:
    error = MergeError("NaN in the input", where="tensor 'x'")
    executor = ScriptedExecutor({"a": [error]}, num_workers=3, hold=["b", "c"])
    with pytest.raises(MergeError) as caught:
        run(executor, [shard("a", 30), shard("b", 20), shard("c", 10), shard("d", 5)])
    assert caught.value is error
    assert executor.submitted == ["a", "b", "c"]
    # The running ones are waited for, so that they clean up behind themselves, before the workers go.
    assert executor.running == []
    assert executor.calls == ["start 4", "stop", "close"]


def test_error_beside_other_ends_waits_for_nobody_who_has_ended() -> None:
    error = MergeError("NaN in the input", where="tensor 'x'")
    executor = ScriptedExecutor({"a": [error]}, num_workers=3, at_once=3)
    with pytest.raises(MergeError):
        run(executor, [shard("a", 30), shard("b", 20), shard("c", 10)])
    assert executor.running == []


def test_stop_ends_the_merge_with_running_shards_abandoned() -> None:
    stop = threading.Event()
    executor = ScriptedExecutor({}, num_workers=2, hold=["b"])
    notes = Notes(on_event=lambda kind: stop.set() if kind == "shard_done" else None)
    with pytest.raises(Interrupted) as caught:
        run(executor, [shard("a", 30), shard("b", 20), shard("c", 10)], notes, stop)
    assert caught.value.exit_code == 130
    assert executor.submitted == ["a", "b"]
    assert executor.running == []
    assert executor.calls == ["start 3", "stop", "close"]
    assert notes.events == [("shard_done", "a")]


def test_workers_are_let_go_when_the_executor_itself_fails() -> None:
    class Broken(ScriptedExecutor):
        def wait(self, seconds: float) -> Sequence[Outcome]:
            if not self.is_stopped:
                raise StorageError("no worker came up", where="the Ray cluster")
            return super().wait(seconds)

    executor = Broken({})
    with pytest.raises(StorageError, match="no worker came up"):
        run(executor, [shard("a")])
    assert executor.calls == ["start 1", "stop", "close"]


def test_workers_are_let_go_when_they_cannot_be_brought_up() -> None:
    class Broken(ScriptedExecutor):
        def start(self, job: Job, num_shards: int) -> None:
            super().start(job, num_shards)
            raise StorageError("no such output", where="/nowhere")

    executor = Broken({})
    with pytest.raises(StorageError, match="no such output"):
        run(executor, [shard("a")])
    assert executor.calls == ["start 1", "stop", "close"]


def test_a_worker_that_does_not_obey_is_given_the_grace_period_only() -> None:
    class Deaf(ScriptedExecutor):
        def wait(self, seconds: float) -> Sequence[Outcome]:
            stop.set()
            waited.append(seconds)
            now[0] += seconds
            return []

    now, waited, stop = [0.0], list[float](), threading.Event()
    executor = Deaf({}, hold=["a"])
    with pytest.raises(Interrupted):
        run_shards([shard("a")], JOB, executor, Notes(), stop, clock=lambda: now[0])
    assert executor.calls == ["start 1", "stop", "close"]
    assert sum(waited) == pytest.approx(GRACE_SECONDS, abs=1)


def test_what_fails_while_the_merge_is_stopped_hides_nothing() -> None:
    class Gone(ScriptedExecutor):
        def wait(self, seconds: float) -> Sequence[Outcome]:
            stop.set()
            if self.is_stopped:
                raise StorageError("no worker came up", where="the Ray cluster")
            return []

    stop = threading.Event()
    with pytest.raises(Interrupted):
        run(Gone({}, hold=["a"]), [shard("a")], None, stop)


def test_the_check_ends_the_merge_and_shards_in_work_are_abandoned() -> None:
    def check() -> None:
        if executor.submitted:
            raise StorageError("taken over", where="/nowhere", retryable=False)

    executor = ScriptedExecutor({}, hold=["a"])
    with pytest.raises(StorageError, match="taken over"):
        run_shards([shard("a"), shard("b")], JOB, executor, Notes(), threading.Event(), Rules(check))
    assert executor.submitted == ["a"]
    assert executor.calls == ["start 2", "stop", "close"]
    assert executor.running == []
