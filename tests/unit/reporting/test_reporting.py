"""What people and logs see, by a clock that the test turns."""

from __future__ import annotations

import ast
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

import mergekit_ray
from mergekit_ray.cli import tables
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.reporting.live import LiveReporter
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import (
    JsonReporter,
    LineReporter,
    Meter,
    Rates,
    duration,
    level_of,
    line_of,
    traffic,
)
from mergekit_ray.reporting.showing import visible


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def done(read_bytes: int, written_bytes: int = 0, num_tensors: int = 0) -> Progress:
    return Progress(read_bytes=read_bytes, written_bytes=written_bytes, num_tensors=num_tensors)


def test_rate_and_time_to_go(clock: Clock) -> None:
    meter = Meter(10_000, clock)
    assert meter.update(done(0)) == Rates(0.0, 0.0, None)
    clock.now += 2
    assert meter.update(done(600, 200)) == Rates(300.0, 100.0, (10_000 - 800) / 400)
    clock.now += 2
    assert meter.update(done(1000, 600)) == Rates(250.0, 150.0, (10_000 - 1600) / 400)


def test_the_rate_is_that_of_the_last_ten_seconds(clock: Clock) -> None:
    meter = Meter(1_000_000, clock)
    total = 0
    for second in range(60):
        total += 1000 if second < 30 else 50
        clock.now += 1
        rates = meter.update(done(total, 2 * total))
    assert (rates.read, rates.written) == (50.0, 100.0)
    assert len(meter.samples) <= 12


def test_a_lost_worker_makes_no_negative_rate(clock: Clock) -> None:
    meter = Meter(1000, clock)
    meter.update(done(500))
    clock.now += 1
    assert meter.update(done(100)) == Rates(0.0, 0.0, None)


def test_time_to_go_is_unknown_until_something_is_written(clock: Clock) -> None:
    meter = Meter(1000, clock)
    meter.update(done(0))
    clock.now += 1
    assert meter.update(done(900)).remaining is None
    clock.now += 1
    assert meter.update(done(900, 50)).remaining == 50 / (950 / 2)


def test_an_interrupted_call_says_how_to_resume() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, visible(None, progress=False):
        raise KeyboardInterrupt
    [note] = caught.value.__notes__
    assert "again to resume" in note


def test_more_than_all_leaves_nothing_to_go(clock: Clock) -> None:
    meter = Meter(100, clock)
    meter.update(done(0))
    clock.now += 1
    assert meter.update(done(150)) == Rates(150.0, 0.0, 0.0)


def test_no_field_of_an_event_hides_its_time_kind_or_message() -> None:
    calls = [
        node
        for file in Path(mergekit_ray.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event"
    ]
    fields = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}
    assert {"merge_seconds", "watch_seconds", "num_bytes"} <= fields
    assert fields.isdisjoint({"time", "level", "run_id", "event", "message", "seconds"})


def test_a_field_that_would_hide_the_time_is_refused(clock: Clock) -> None:
    for name in ("time", "level", "run_id", "seconds"):
        with pytest.raises(AssertionError):
            JsonReporter(io.StringIO(), clock).event("published", "done", **{name: 1.0})


def test_json_lines(plan: Plan, clock: Clock) -> None:
    stream = io.StringIO()
    began = datetime(2026, 3, 1, 23, 59, 59, 250_000, tzinfo=UTC)
    reporter = JsonReporter(stream, clock, lambda: began + timedelta(seconds=clock.now - 1000))
    reporter.begin(plan)
    reporter.event("planned", 'a "plan"\nof two lines', num_shards=3)
    reporter.progress(done(0), 0, 3)
    clock.now += 2
    reporter.progress(done(300, 100, 5), 1, 3)
    clock.now += 0.5
    reporter.progress(done(400, 100, 5), 1, 3)  # within a second of the last
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["planned", "progress", "progress"]
    [run_id] = {line["run_id"] for line in lines}
    assert lines[0] == {
        "time": "2026-03-01T23:59:59.250Z",
        "level": "info",
        "run_id": run_id,
        "seconds": 0.0,
        "event": "planned",
        "message": 'a "plan"\nof two lines',
        "num_shards": 3,
    }
    assert lines[2] == {
        "time": "2026-03-02T00:00:01.250Z",
        "level": "info",
        "run_id": run_id,
        "seconds": 2.0,
        "event": "progress",
        "read_bytes": 300,
        "fetched_bytes": 0,
        "written_bytes": 100,
        "num_tensors": 5,
        "shards_done": 1,
        "num_shards": 3,
        "read_bytes_per_second": 150,
        "written_bytes_per_second": 50,
        "remaining_seconds": round((plan.read_bytes + plan.num_bytes - 400) / 200, 1),
    }


def test_lines_of_text(plan: Plan, clock: Clock) -> None:
    stream = io.StringIO()
    reporter = LineReporter(stream, clock)
    reporter.begin(plan)
    reporter.event("planned", "12 parameters", ignored=1)
    reporter.progress(done(0), 0, 3)
    clock.now += 5
    reporter.progress(done(100), 0, 3)
    clock.now += 5
    reporter.progress(done(300, 100), 1, 3)
    reporter.event("worker_lost", "model-2 is put back")
    first, second, third = stream.getvalue().splitlines()
    assert first == "[    0.0s] 12 parameters"
    read, written = (format_bytes(num_bytes) for num_bytes in (plan.read_bytes, plan.num_bytes))
    left = duration((plan.read_bytes + plan.num_bytes - 400) / 40)
    assert second == (
        f"[   10.0s] read 300 B of {read} (30 B/s), wrote 100 B of {written} (10 B/s), 1 of 3 shards, {left} to go"
    )
    assert third == "[   10.0s] warning: model-2 is put back"


def test_what_is_read_has_no_rate_any_more(plan: Plan) -> None:
    """It would fall while the rest is computed and written."""
    told = traffic(done(plan.read_bytes, 50), plan, Rates(30.0, 10.0, None))
    read, written = (format_bytes(num_bytes) for num_bytes in (plan.read_bytes, plan.num_bytes))
    assert told == f"read {read} of {read}, wrote 50 B of {written} (10 B/s)"


@pytest.mark.parametrize(
    ("kind", "level"), [("published", "info"), ("warning", "warning"), ("worker_lost", "warning"), ("error", "error")]
)
def test_levels(kind: str, level: str) -> None:
    assert level_of(kind) == level
    assert line_of(kind, "it is so") == ("it is so" if level == "info" else f"{level}: it is so")


def test_every_run_has_an_id_of_its_own(clock: Clock) -> None:
    streams = [io.StringIO(), io.StringIO()]
    for stream in streams:
        JsonReporter(stream, clock).event("planned", "it is so")
    assert len({json.loads(stream.getvalue())["run_id"] for stream in streams}) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_bar_counts_tensors_and_bytes(plan: Plan, width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    reporter = LiveReporter(console)
    reporter.begin(plan)
    reporter.event("planned", "plan of [model] things")
    reporter.event("warning", "a word " * 20)
    reporter.progress(done(100, 50, 2), 0, 3)
    reporter.close()
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    assert "plan of [model] things" in text
    assert "warning: a word a word" in text
    assert f"2/{num_tensors} tensors" in text
    assert f"read 100 B of {format_bytes(plan.read_bytes)} (0 B/s), wrote 50 B of " in text
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]", text)) <= width


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.9, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_of_a_plan(plan: Plan, models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = replace(
        plan,
        warnings=("read [0, 16] of /x/[draft]/y",),
        dropped={"/x/[draft]: w": "no slice takes it"},
        aliased={"h": "e"},
    )
    tables.print_plan(told)
    text = capsys.readouterr().out
    for shard in plan.shards:
        row = next(line for line in text.splitlines() if shard.file in line)
        assert re.split(r"  +", row)[1:5] == [
            str(len(shard.tensors)),
            f"{shard.num_parameters:,}",
            format_bytes(shard.read_bytes),
            format_bytes(shard.num_bytes),
        ]
    sums = [re.split(r"  +", line) for line in text.splitlines()]
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    assert [row[1:5] for row in sums if row[0] == f"all {len(plan.shards)}"] == [
        [str(num_tensors), f"{plan.num_parameters:,}", format_bytes(plan.read_bytes), format_bytes(plan.num_bytes)]
    ]
    assert "warning: read [0, 16] of /x/[draft]/y" in text
    assert "Not used: /x/[draft]: w (no slice takes it)" in text
    assert "Shared: h (e)" in text


def test_long_lists_are_cut_and_counted(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    many = replace(plan, shards=plan.shards * 20, dropped={f"t{i}": "why" for i in range(20)})
    tables.print_plan(many)
    text = capsys.readouterr().out
    assert "... and 20 more" in text
    assert "Not used: ... and 12 more (--json lists all)" in text


def test_the_tables_of_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_methods()
    text = capsys.readouterr().out
    for name in ("linear", "slerp", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        assert re.search(rf"^{name}  +(required|optional|none) ", text, re.MULTILINE)
    tables.print_method("ties")
    ties = capsys.readouterr().out
    assert "https://arxiv.org/abs/2306.01708" in ties
    rows = [re.split(r"  +", line)[:3] for line in ties.splitlines()]
    assert ["weight", "per model", "required"] in rows
    assert ["density", "per model", "1.0"] in rows
    assert ["lambda", "per tensor", "1.0"] in rows
    assert ["normalize", "per tensor", "True"] in rows
