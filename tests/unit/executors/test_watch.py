"""Which workers are reported, given up, and helped out."""

from __future__ import annotations

import pytest

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.plan import Shard
from mergekit_ray.executors.watch import SECONDS_VARIABLE, Pace, Standing, Watch
from support.merging import Events


def standing(silent: float = 0.0, still: float = 0.0, worker: str = "w") -> Standing:
    return Standing(worker, "worker-0", ("model-1",), silent, still)


@pytest.mark.parametrize(
    ("silent", "still", "is_told", "is_ended"),
    [
        (20, 20, False, False),
        (30, 30, True, False),
        (100, 100, True, False),
        (101, 101, True, True),
        (0, 125, False, False),
        (0, 126, True, False),
        (0, 500, True, False),
        (0, 501, True, True),
    ],
)
def test_one_that_answers_has_five_times_as_long(silent: float, still: float, is_told: bool, is_ended: bool) -> None:
    events = Events()
    ended = Watch(events, 100).look([standing(silent, still)])
    assert bool(ended) is is_ended
    assert bool(events.all) is (is_told and not is_ended)


def test_it_is_told_of_once_for_the_same_shards() -> None:
    events = Events()
    watch = Watch(events, 100)
    for seconds in (30, 40, 50):
        watch.look([standing(seconds)])
    [told] = events.of("worker_stalled")
    assert told["message"] == (
        "worker-0 has not answered for 30 s on model-1; after 100 s its shards go to other workers"
    )


def test_a_thread_is_only_told_of() -> None:
    events = Events()
    assert Watch(events, 100).look([standing(still=1e6, worker="")]) == []
    [told] = events.of("worker_stalled")
    assert told["message"].endswith("has made no progress for 1000000 s on model-1")


def test_the_time_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "7")
    assert Watch(Events()).look([standing(8)])


@pytest.mark.parametrize("value", ["abc", "-1", "0", "nan", "inf"])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{value!r} is not a number of seconds") as caught:
        Watch(Events())
    assert caught.value.where == SECONDS_VARIABLE


class TestPace:
    def test_without_anything_to_compare_with_nothing_is_slow(self) -> None:
        pace = Pace()
        pace.begin(Shard("a", b"1234", ()), 0)
        assert pace.slowest(["a"], 1e6) is None

    @pytest.mark.parametrize(("now", "found"), [(79.0, None), (81.0, "b")])
    def test_one_is_slow_that_takes_twice_as_long_for_its_bytes(self, now: float, found: str | None) -> None:
        pace = Pace()
        for file, num_bytes in (("a", 4), ("b", 16), ("c", 32)):
            pace.begin(Shard(file, bytes(num_bytes), ()), 0)
        pace.end("a", 10, is_written=True)
        assert pace.slowest(["b", "c"], now) == found

    def test_seconds_are_too_short_to_tell(self) -> None:
        pace = Pace()
        for file in "ab":
            pace.begin(Shard(file, b"1", ()), 0)
        pace.end("a", 0.001, is_written=True)
        assert pace.slowest(["b"], 19) is None
        assert pace.slowest(["b"], 21) == "b"
