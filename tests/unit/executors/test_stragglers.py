"""What the driver does about workers that stop, and about slow ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from mergekit_ray.core.errors import StorageError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.executors.driver import Job, Outcome, run_shards
from mergekit_ray.executors.watch import Standing
from mergekit_ray.reporting.progress import Progress
from support.driving import JOB, Notes, Rules, shard


class Hand:
    """An executor whose workers do what the test says, a step at each `wait`.

    Args:
        workers: their names.
        steps: what happens at each `wait`: outcomes, after so many seconds have passed.
    """

    def __init__(self, workers: Sequence[str], steps: Sequence[tuple[float, list[Outcome]]]) -> None:
        self.now = 0.0
        self.steps = deque(steps)
        self.held: dict[str, list[str]] = {name: [] for name in workers}
        self.silent: dict[str, float] = {}
        self.given_up: list[str] = []
        self._lost: list[Outcome] = []
        self.num_workers = len(workers)

    def start(self, job: Job, num_shards: int) -> None:
        pass

    def idle(self) -> int:
        return sum(not files for files in self.held.values())

    def submit(self, shard: Shard) -> None:
        next(files for files in self.held.values() if not files).append(shard.file)

    def wait(self, seconds: float) -> Sequence[Outcome]:
        passed, outcomes = self.steps.popleft()
        self.now += passed
        self.silent = {name: self.silent.get(name, 0) + passed for name in self.silent}
        lost, self._lost = self._lost, []
        for outcome in outcomes:
            self.held[outcome.place].remove(outcome.file)
            if outcome.lost:
                del self.held[outcome.place]
        return [*lost, *outcomes]

    def progress(self, *, settled: bool = False) -> Progress:
        return Progress()

    def standings(self) -> Sequence[Standing]:
        held = [(name, files) for name, files in self.held.items() if files]
        return [Standing(name, name, tuple(files), self.silent.get(name, 0), 0) for name, files in held]

    def give_up(self, worker: str) -> None:
        self.given_up.append(worker)
        self._lost += [lost(file, worker) for file in self.held.pop(worker)]

    def has_spare(self) -> bool:
        return self.idle() > 0

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def done(file: str, place: str) -> Outcome:
    return Outcome(file, place, record=ShardRecord(file, 1, "0" * 64, {}, "first"), place=place)


def lost(file: str, place: str) -> Outcome:
    return Outcome(file, place, error=StorageError("lost"), lost=True, place=place)


def by_hand(hand: Hand, shards: Sequence[Shard]) -> tuple[dict[str, ShardRecord], Rules, Notes]:
    rules, notes = Rules(), Notes()
    records = run_shards(shards, JOB, hand, notes, threading.Event(), rules, clock=lambda: hand.now)
    assert not hand.steps
    return records, rules, notes


def test_a_worker_that_answers_no_more_is_told_of_then_given_up_and_its_shard_done_by_another() -> None:
    hand = Hand("ab", [(0, []), (40, []), (90, []), (0, [done("y", "b")]), (1, [done("x", "b")])])
    hand.silent = {"a": 0}
    records, rules, notes = by_hand(hand, [shard("x", 20), shard("y", 10)])
    assert set(records) == {"x", "y"}
    assert hand.given_up == ["a"]
    assert rules.given_up == [("a", ["x"])], "what it writes is refused, before another is given its shard"
    assert [kind for kind, _ in notes.events] == [
        "worker_stalled",
        "worker_given_up",
        "shard_done",
        "worker_lost",
        "shard_done",
    ]


def test_with_nothing_else_to_do_another_begins_what_takes_too_long_and_the_first_to_commit_wins() -> None:
    hand = Hand("ab", [(5, [done("y", "b")]), (100, []), (0, []), (5, [done("x", "b")])])
    records, rules, notes = by_hand(hand, [shard("x", 20), shard("y", 10)])
    assert records["x"].version == "settled", "the other may have written the same bytes after it"
    assert records["y"].version == "first"
    assert hand.given_up == ["a"]
    assert rules.given_up == [("a", ["x"])]
    assert ("backup", "x") in notes.events


def test_the_slow_one_may_be_first_after_all() -> None:
    hand = Hand("ab", [(5, [done("y", "b")]), (100, []), (0, []), (5, [done("x", "a")])])
    records, rules, _ = by_hand(hand, [shard("x", 20), shard("y", 10)])
    assert set(records) == {"x", "y"}
    assert (hand.given_up, rules.given_up) == (["b"], [("b", ["x"])])


def test_a_shard_that_one_of_two_has_lost_is_not_begun_again() -> None:
    steps: list[tuple[float, list[Outcome]]] = [(5, [done("y", "b")]), (100, []), (0, []), (5, [lost("x", "a")])]
    hand = Hand("ab", [*steps, (5, [done("x", "b")])])
    records, rules, notes = by_hand(hand, [shard("x", 20), shard("y", 10)])
    assert set(records) == {"x", "y"}
    assert rules.given_up == [("a", [])], "what the other has prepared stays"
    assert "worker_lost" not in dict(notes.events)


def test_a_shard_that_both_have_lost_is_put_back_once() -> None:
    steps: list[tuple[float, list[Outcome]]] = [(5, [done("y", "b")]), (100, []), (0, [])]
    hand = Hand("abc", [*steps, (5, [lost("x", "a"), lost("x", "b")]), (1, [done("x", "c")])])
    records, _, notes = by_hand(hand, [shard("x", 20), shard("y", 10)])
    assert set(records) == {"x", "y"}
    assert notes.events.count(("worker_lost", "x")) == 1
