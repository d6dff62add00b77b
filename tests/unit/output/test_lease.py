"""Who may write: one driver, and after its death another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import Interrupted, StorageError
from mergekit_ray.output import lease as lease_module
from mergekit_ray.output.destination import LEASE_FILE
from mergekit_ray.output.lease import LONG_TERM, Holder, Lease, Term, discard_dead, hold
from mergekit_ray.reporting.reporters import SilentReporter
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import ConditionalSink
from support.merging import Events, wait_until

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


def taken(sink: LocalStore, term: Term = SLOW, tell: Any = None, stop: threading.Event | None = None) -> Any:
    return hold(sink, tell or SilentReporter(), stop or threading.Event(), term)


def elsewhere(**changes: Any) -> Holder:
    """A lease of another machine."""
    return replace(Holder.of_this_process(SLOW), host="far-away", processes="another boot", pid=7, **changes)


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
    assert "wait for its end, stop it, or choose another output" in text
    assert "run again 300 s after its last renewal" in text
    assert written(sink) == holder


def test_of_many_at_once_one_wins(sink: LocalStore) -> None:
    start, end = threading.Barrier(8), threading.Event()

    def compete(_: int) -> bool:
        start.wait(10)
        try:
            with taken(sink):
                end.wait(10)
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
            "import os, sys\n"
            "from mergekit_ray.output.lease import Holder, Term\n"
            "sys.stdout.buffer.write(Holder.of_this_process(Term()).to_bytes())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True)
        sink.put(LEASE_FILE, done.stdout)
        assert written(sink).has_ended
        with taken(sink):
            assert written(sink).pid == os.getpid()

    def test_a_process_that_has_ended_but_was_not_waited_for_is_dead(self) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            own = Holder.of_this_process(SLOW)
            started = wait_until(lambda: lease_module._started(process.pid))
            holder = replace(own, pid=process.pid, started=started)
            wait_until(lambda: holder.started == lease_module._NEVER or holder.has_ended)
        assert holder.has_ended

    def test_another_process_of_the_same_number_is_not_it(self) -> None:
        parent = os.getppid()
        other = replace(Holder.of_this_process(SLOW), pid=parent, started=lease_module._started(parent))
        assert other.started is not None
        assert not other.has_ended
        assert replace(other, started=other.started - 1).has_ended
        assert not replace(other, started=None).has_ended

    def test_one_that_could_not_be_released_is_nobodys(self, sink: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(names: object) -> None:
            raise StorageError("not today")

        with monkeypatch.context() as broken, taken(sink):
            assert not written(sink).has_ended
            broken.setattr(sink, "delete", fail)
        left = written(sink)
        assert left.has_ended
        with taken(sink):
            assert written(sink).token != left.token

    @pytest.mark.parametrize("processes", [None, "another boot"])
    def test_elsewhere_nothing_is_known(self, processes: str | None) -> None:
        assert not replace(elsewhere(), processes=processes, started=1).has_ended

    def test_elsewhere_it_is_watched_and_then_taken_over(self, sink: LocalStore) -> None:
        now = time.time()
        sink.put(LEASE_FILE, elsewhere(renewed=now - 1000, term=QUICK).to_bytes())
        events = Events()
        began = time.monotonic()
        with taken(sink, QUICK, events):
            assert time.monotonic() - began >= QUICK.watch_seconds
            assert written(sink).pid == os.getpid()
        [told] = events.of("lease_expired")
        assert "far-away" in told["message"]

    @pytest.mark.parametrize("skew", [-299.0, 0.0, 299.0])
    def test_before_its_term_is_over_it_is_not(self, sink: LocalStore, skew: float) -> None:
        sink.put(LEASE_FILE, elsewhere(renewed=time.time() + skew).to_bytes())
        with pytest.raises(StorageError, match="far-away"), taken(sink):
            pass
        assert written(sink).host == "far-away"

    @pytest.mark.parametrize("skew", [-1e6, 1e6])
    def test_one_that_is_renewed_is_alive_whatever_its_clock_says(self, sink: LocalStore, skew: float) -> None:
        term = Term(seconds=0.4, renew_seconds=0.5)
        holder = elsewhere(term=term)
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(0.1):
                sink.put(LEASE_FILE, replace(holder, renewed=time.time() + skew).to_bytes())

        sink.put(LEASE_FILE, replace(holder, renewed=time.time() + skew).to_bytes())
        thread = threading.Thread(target=renew)
        thread.start()
        try:
            with pytest.raises(StorageError, match="see to the clocks"), taken(sink):
                pass
        finally:
            stop.set()
            thread.join()

    def test_one_that_cannot_be_read_is_watched(self, sink: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Term, "watch_seconds", 0.05)
        for damage in (b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "term": 3}', b"\xff"):
            sink.put(LEASE_FILE, damage)
            with taken(sink):
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
                    end.wait(20)
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
        with taken(sink, QUICK) as lease:
            lease.rest()
            before = written(sink)
            time.sleep(4 * QUICK.renew_seconds)
            assert written(sink) == before
        assert sink.list() == []

    @pytest.mark.parametrize("by", ["another", "nobody"])
    def test_one_that_is_lost_is_noticed_and_left_alone(self, sink: LocalStore, by: str) -> None:
        with taken(sink, QUICK) as lease:
            if by == "another":
                # As a store without locks may let it happen.
                wait_until(lambda: self._overwritten(sink, lease))
            else:
                sink.delete([LEASE_FILE])
            with pytest.raises(StorageError, match="no longer holds its output") as caught:
                wait_until(lease.check)
            assert ("far-away" in str(caught.value)) is (by == "another")
            with pytest.raises(StorageError, match="no longer holds"):
                lease.confirm()
        assert [file.name for file in sink.list()] == ([LEASE_FILE] if by == "another" else [])

    @staticmethod
    def _overwritten(sink: LocalStore, lease: Lease) -> bool:
        with lease._lock:
            sink.put(LEASE_FILE, elsewhere().to_bytes())
        return True

    def test_a_renewal_whose_answer_was_lost_is_ours(self, sink: LocalStore) -> None:
        with taken(sink) as lease:
            sink.put(LEASE_FILE, replace(lease._mine, renewed=1.0).to_bytes())
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
                assert failed.wait(10)
            lease.confirm()

    def test_one_who_slept_for_its_term_asks_before_it_goes_on(self, sink: LocalStore) -> None:
        with taken(sink) as lease:
            sink.put(LEASE_FILE, elsewhere().to_bytes())
            lease.check()  # nothing is known of it yet
            lease._confirmed -= SLOW.seconds + 1
            with pytest.raises(StorageError, match=r"taken over by .* far-away"):
                lease.check()


class TestLeftBeside:
    """What a finished output says of who made it."""

    @pytest.mark.parametrize(
        ("holder", "stays"),
        [
            (elsewhere(renewed=time.time()), True),
            (elsewhere(renewed=time.time() - 2 * SLOW.seconds), False),
            (replace(Holder.of_this_process(SLOW), pid=os.getppid(), started=1), False),
        ],
        ids=["renewed", "expired", "of a process that has ended"],
    )
    def test_one_of_a_dead_driver_is_removed(self, sink: LocalStore, holder: Holder, stays: bool) -> None:
        sink.put(LEASE_FILE, holder.to_bytes())
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
