"""Who may write: one driver, and after its death another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import Interrupted, StorageError
from mergekit_ray.output.holder import LONG_TERM, NEVER, Holder, Term, started_at
from mergekit_ray.output.lease import discard_dead, hold
from mergekit_ray.reporting.reporters import SilentReporter
from mergekit_ray.storage.fence import LEASE_FILE
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import ConditionalSink
from support.merging import Events
from support.waiting import DEADLINE_SECONDS, wait_until

QUICK = Term(seconds=0.4, renew_seconds=0.05)
SLOW = Term(seconds=300.0, renew_seconds=60.0)


class Unconditional(LocalStore):
    """A store that cannot replace a file conditionally."""

    replace = None  # type: ignore[assignment] # what makes it no `ConditionalSink`


@pytest.fixture(params=[LocalStore, Unconditional])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    store: LocalStore = request.param(tmp_path / "out")
    assert isinstance(store, ConditionalSink) is (request.param is LocalStore)
    return store


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def taken(
    sink: LocalStore,
    term: Term = SLOW,
    tell: Any = None,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.time,
) -> Any:
    return hold(sink, tell or SilentReporter(), stop or threading.Event(), term, clock)


def own() -> Holder:
    return Holder.of_this_process(SLOW, time.time())


def elsewhere(**changes: Any) -> Holder:
    """A lease of another machine."""
    return replace(own(), host="far-away", processes="another boot", pid=7, **changes)


def written(sink: LocalStore) -> Holder:
    found = Holder.from_bytes(sink.read(LEASE_FILE, max_bytes=1 << 16))
    assert found is not None
    return found


def test_it_says_who_holds_it_and_goes_at_the_end(sink: LocalStore) -> None:
    with taken(sink):
        data = json.loads(sink.read(LEASE_FILE, max_bytes=1 << 16))
        assert (data["pid"], data["term"]) == (os.getpid(), {"seconds": 300.0, "renew_seconds": 60.0})
        assert {"host", "user", "acquired", "renewed"} <= data.keys()
        assert data["acquired"].endswith("+00:00")
        assert written(sink).to_bytes() == sink.read(LEASE_FILE, max_bytes=1 << 16)
    assert sink.list() == []
    assert not (Path(sink.uri) / ".mergekit-ray").exists()


def test_it_goes_on_failure(sink: LocalStore) -> None:
    with pytest.raises(ZeroDivisionError), taken(sink):
        raise ZeroDivisionError
    assert sink.list() == []


def test_a_second_is_refused_and_told_who_and_what_to_do(sink: LocalStore, stack: ExitStack) -> None:
    stack.enter_context(taken(sink))
    holder = written(sink)
    with pytest.raises(StorageError) as caught:
        stack.enter_context(taken(sink))
    text = str(caught.value)
    assert (caught.value.exit_code, caught.value.retryable) == (4, False)
    assert caught.value.where == sink.uri
    assert f"{holder.user} on {holder.host} (process {os.getpid()}, since " in text
    assert "wait until it ends, stop it, or choose another output" in text
    assert "run again 300 s after its last renewal" in text
    assert written(sink) == holder


def test_of_many_at_once_one_wins(sink: LocalStore) -> None:
    start, end = threading.Barrier(8), threading.Event()

    def compete(_: int) -> bool:
        start.wait(DEADLINE_SECONDS)
        try:
            with taken(sink):
                end.wait(DEADLINE_SECONDS)
        except StorageError:
            return False
        return True

    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(compete, number) for number in range(8)]
        wait_until(lambda: sum(future.done() for future in futures) == 7)
        end.set()
        assert sum(future.result() for future in futures) == 1


class TestDead:
    def test_of_this_machine_it_is_taken_over_at_once(self, sink: LocalStore) -> None:
        script = (
            "import sys, time\n"
            "from mergekit_ray.output.holder import Holder, Term\n"
            "sys.stdout.buffer.write(Holder.of_this_process(Term(), time.time()).to_bytes())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        sink.put(LEASE_FILE, done.stdout)
        assert written(sink).has_ended
        with taken(sink):
            assert written(sink).pid == os.getpid()

    def test_a_process_that_has_ended_but_was_not_waited_for_is_dead(self) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            started = wait_until(lambda: started_at(process.pid))
            holder = replace(own(), pid=process.pid, started=started)
            wait_until(lambda: holder.started == NEVER or holder.has_ended)
        assert holder.has_ended

    def test_another_process_of_the_same_number_is_not_it(self) -> None:
        parent = os.getppid()
        other = replace(own(), pid=parent, started=started_at(parent))
        assert other.started is not None
        assert not other.has_ended
        assert replace(other, started=other.started - 1).has_ended
        assert not replace(other, started=None).has_ended

    def test_one_that_could_not_be_released_is_nobodys(self, sink: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(store: object, names: object) -> None:
            raise StorageError("not today")

        with monkeypatch.context() as broken, taken(sink):
            assert not written(sink).has_ended
            broken.setattr(LocalStore, "delete", fail)
        left = written(sink)
        assert left.has_ended
        with taken(sink):
            assert written(sink).token != left.token

    @pytest.mark.parametrize("processes", [None, "another boot"])
    def test_elsewhere_nothing_is_known(self, processes: str | None) -> None:
        assert not replace(elsewhere(), processes=processes, started=1).has_ended

    def test_elsewhere_it_is_watched_and_then_taken_over(self, sink: LocalStore) -> None:
        sink.put(LEASE_FILE, elsewhere(renewed=time.time() - 1000, term=QUICK).to_bytes())
        events = Events()
        with taken(sink, QUICK, events):
            assert written(sink).pid == os.getpid()
        [told] = events.of("lease_expired")
        assert "far-away" in told["message"]
        assert told["watch_seconds"] == QUICK.watch_seconds

    @pytest.mark.parametrize("skew", [-299.0, 0.0, 299.0])
    def test_before_its_term_is_over_it_is_not(self, sink: LocalStore, skew: float) -> None:
        now = time.time()
        sink.put(LEASE_FILE, elsewhere(renewed=now + skew).to_bytes())
        with pytest.raises(StorageError, match="far-away"), taken(sink, clock=lambda: now):
            pass
        assert written(sink).host == "far-away"

    @pytest.mark.parametrize("skew", [-1e6, 1e6])
    def test_one_that_is_renewed_is_alive_whatever_its_clock_says(self, sink: LocalStore, skew: float) -> None:
        holder = elsewhere(term=QUICK)
        renewals = itertools.count()

        def renew(kind: str = "") -> None:
            sink.put(LEASE_FILE, replace(holder, renewed=time.time() + skew + next(renewals)).to_bytes())

        renew()
        # It is renewed once it is being watched.
        with pytest.raises(StorageError, match="see to the clocks"), taken(sink, tell=Events(renew)):
            pass
        assert next(renewals) == 2

    def test_one_that_cannot_be_read_is_watched(self, sink: LocalStore) -> None:
        for damage in (b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "term": 3}', b"\xff"):
            sink.put(LEASE_FILE, damage)
            events = Events()
            with taken(sink, QUICK, events):
                assert [kind for kind, _ in events.all] == ["lease_expired"]
                assert written(sink).pid == os.getpid()

    def test_watching_is_stopped(self, sink: LocalStore) -> None:
        sink.put(LEASE_FILE, elsewhere(renewed=0.0).to_bytes())
        stop = threading.Event()
        stop.set()
        with pytest.raises(Interrupted), taken(sink, stop=stop):
            pass
        assert written(sink).host == "far-away"

    def test_of_many_who_take_over_one_wins(self, tmp_path: Path) -> None:
        sink = LocalStore(tmp_path / "out")
        sink.put(LEASE_FILE, elsewhere(renewed=0.0, term=QUICK).to_bytes())
        end = threading.Event()

        def compete(_: int) -> bool:
            try:
                with taken(sink):
                    end.wait(DEADLINE_SECONDS)
            except StorageError:
                return False
            return True

        with ThreadPoolExecutor(6) as executor:
            futures = [executor.submit(compete, number) for number in range(6)]
            wait_until(lambda: sum(future.done() for future in futures) == 5)
            end.set()
            assert sum(future.result() for future in futures) == 1


class TestHeld:
    def test_it_is_renewed(self, sink: LocalStore) -> None:
        with taken(sink, QUICK) as lease:
            first = written(sink)
            wait_until(lambda: written(sink).renewed > first.renewed + 2 * QUICK.seconds)
            lease.check()
            assert written(sink).acquired == pytest.approx(first.acquired, abs=0.002)

    def test_at_rest_it_is_not(self, sink: LocalStore) -> None:
        before = set(threading.enumerate())
        with taken(sink, QUICK) as lease:
            [keeper] = set(threading.enumerate()) - before
            lease.rest()
            assert not keeper.is_alive()
        assert sink.list() == []

    @pytest.mark.parametrize("by", ["another", "nobody"])
    def test_one_that_is_lost_is_noticed_and_left_alone(self, sink: LocalStore, by: str) -> None:
        def noticed() -> None:
            # Again and again: in a store that has no conditions a renewal may come in between.
            if by == "another":
                sink.put(LEASE_FILE, elsewhere().to_bytes())
            else:
                sink.delete([LEASE_FILE])
            lease.check()

        with taken(sink, QUICK) as lease:
            with pytest.raises(StorageError, match="no longer holds its output") as caught:
                wait_until(noticed)
            assert ("far-away" in str(caught.value)) is (by == "another")
            with pytest.raises(StorageError, match="no longer holds"):
                lease.confirm()
        assert [file.name for file in sink.list()] == ([LEASE_FILE] if by == "another" else [])

    def test_a_renewal_whose_answer_was_lost_is_ours(self, sink: LocalStore) -> None:
        with taken(sink) as lease:
            sink.put(LEASE_FILE, replace(written(sink), renewed=1.0).to_bytes())
            lease.confirm()
            assert written(sink).renewed > 1.0

    def test_a_store_that_fails_for_a_while_does_not_take_it(
        self, sink: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            failed.set()
            raise StorageError("not today")

        failed = threading.Event()
        with taken(sink, QUICK) as lease:
            with monkeypatch.context() as broken:
                for name in ("put", "read_head"):
                    broken.setattr(sink, name, fail)
                assert failed.wait(DEADLINE_SECONDS)
            lease.confirm()

    def test_one_who_slept_for_its_term_asks_before_it_goes_on(self, sink: LocalStore) -> None:
        now = time.time()
        with taken(sink, clock=lambda: now) as lease:
            sink.put(LEASE_FILE, elsewhere().to_bytes())
            lease.check()  # nothing is known of it yet
            now += SLOW.seconds + 1
            with pytest.raises(StorageError, match=r"taken over by .* far-away"):
                lease.check()


class TestLeftBeside:
    """What a finished output says of who made it."""

    @pytest.mark.parametrize(
        ("holder", "stays"),
        [
            (lambda: elsewhere(renewed=time.time()), True),
            (lambda: elsewhere(renewed=time.time() - 2 * SLOW.seconds), False),
            (lambda: replace(own(), pid=os.getppid(), started=1), False),
        ],
        ids=["renewed", "expired", "of a process that has ended"],
    )
    def test_one_of_a_dead_driver_is_removed(self, sink: LocalStore, holder: Callable[[], Holder], stays: bool) -> None:
        sink.put(LEASE_FILE, holder().to_bytes())
        discard_dead(sink)
        assert [stat.name for stat in sink.list()] == [LEASE_FILE] * stays

    def test_ones_own_stays(self, sink: LocalStore) -> None:
        with taken(sink):
            discard_dead(sink)
            assert written(sink).pid == os.getpid()

    def test_it_is_in_nobodys_way(self, sink: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(names: object) -> None:
            raise StorageError("not today")

        sink.put(LEASE_FILE, elsewhere(renewed=0.0).to_bytes())
        monkeypatch.setattr(sink, "delete", fail)
        discard_dead(sink)
        assert written(sink).host == "far-away"


def test_where_each_renewal_is_a_commit_there_are_few(tmp_path: Path) -> None:
    class Publishing(LocalStore):
        def finish(self) -> None:
            """Nothing."""

    sink = Publishing(tmp_path)
    with hold(sink, SilentReporter(), threading.Event()):
        assert written(sink).term == LONG_TERM
    with hold(LocalStore(tmp_path), SilentReporter(), threading.Event()):
        assert written(sink).term == Term(300.0, 60.0)
