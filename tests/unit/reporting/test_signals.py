"""Signals: asked once, asked twice, asked and not obeyed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mergekit_ray.reporting.signals import EXIT_CODE, Signals, listening
from support.waiting import DEADLINE_SECONDS


class EndedError(Exception):
    """Stands for the end of the process."""


class Process:
    """What signals do to a process that lives on to tell."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.announced: list[int | None] = []
        self.codes: list[int] = []
        self.has_ended = threading.Event()

    def say(self, line: str, *, exit_code: int | None = None) -> None:
        self.said.append(line)
        self.announced.append(exit_code)

    def end(self, code: int) -> None:
        self.codes.append(code)
        self.has_ended.set()
        if threading.current_thread() is threading.main_thread():
            raise EndedError


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def listen(process: Process, grace_seconds: float = 60.0) -> Any:
    return listening(process.say, grace_seconds=grace_seconds, end=process.end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
class TestBoth:
    def test_with_nothing_open_the_first_ends_the_command(self, process: Process, number: int) -> None:
        with pytest.raises(KeyboardInterrupt), listen(process):
            os.kill(os.getpid(), number)
        assert process.codes == []

    def test_with_something_open_the_first_asks(self, process: Process, number: int) -> None:
        with listen(process) as signals, signals.graceful() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.is_set()
        assert process.codes == []
        [line] = process.said
        assert signal.Signals(number).name in line
        assert "stopping cleanly within 60 s; interrupt again to stop at once" in line

    def test_the_second_ends_at_once(self, process: Process, number: int) -> None:
        with listen(process) as signals, signals.graceful():
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(EndedError):
                os.kill(os.getpid(), number)
        assert process.codes == [EXIT_CODE]
        assert process.announced == [None, EXIT_CODE]
        assert "run the same command to resume" in process.said[-1]


def test_a_stop_that_hangs_is_ended(process: Process) -> None:
    with listen(process, grace_seconds=0.05) as signals, signals.graceful():
        os.kill(os.getpid(), signal.SIGINT)
        assert process.has_ended.wait(DEADLINE_SECONDS)
    assert process.codes == [EXIT_CODE]
    assert "run the same command to resume" in process.said[-1]


def test_nobody_is_ended_without_a_signal(process: Process) -> None:
    before = set(threading.enumerate())
    with listen(process, grace_seconds=0.0) as signals, signals.graceful():
        [watcher] = set(threading.enumerate()) - before
    watcher.join(DEADLINE_SECONDS)
    assert not watcher.is_alive()
    assert process.codes == []


def test_once_the_work_is_done_a_signal_ends_the_command_again(process: Process) -> None:
    with listen(process) as signals:
        with signals.graceful() as stop:
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.is_set()


def test_a_process_that_cannot_end_by_itself_is_ended_with_the_code() -> None:
    """A thread that Python would wait for at its exit holds it up, as a store that does not answer may."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from mergekit_ray.reporting.signals import listening\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "say = lambda line, exit_code=None: print(line, flush=True)\n"
        "with listening(say, grace_seconds=0.3) as signals, signals.graceful():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == EXIT_CODE, done.stderr
    assert "did not stop within" in done.stdout


def test_a_closed_terminal_does_not_keep_it_from_ending(process: Process) -> None:
    def say(line: str, *, exit_code: int | None = None) -> None:
        raise OSError(line, exit_code)

    signals = Signals(say, 60.0, process.end)
    with signals.graceful() as stop:
        signals.handle(signal.SIGTERM, None)
        assert stop.is_set()
        with pytest.raises(EndedError):
            signals.handle(signal.SIGTERM, None)
    assert process.codes == [EXIT_CODE]
