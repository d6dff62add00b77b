"""The sequence that carries a plan out: what is asked when, and what is not done in vain."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_ray.core.errors import Interrupted, PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.reporting.reporters import Reporter
from support.merging import Events

LOCAL = MergeOptions(executor="local")


class Route:
    """Makes routers, and remembers how often."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.num_asked = 0

    def __call__(self, tell: Reporter, kept: KeptRouters) -> Plan:
        del kept
        self.num_asked += 1
        tell.event("routing", "making the routers")
        return self.plan


def kinds(events: Events) -> list[str]:
    return [kind for kind, _ in events.all if kind != "shard_done"]


def test_routers_are_made_before_the_plan_is_told_and_once(plan: Plan, tmp_path: Path) -> None:
    route, events = Route(plan), Events()
    result = run_plan(plan, str(tmp_path / "out"), LOCAL, reporter=events, route=route)
    assert kinds(events) == ["routing", "planned", "checking", "publishing", "published"]
    assert (route.num_asked, result.num_resumed) == (1, 0)
    assert result.uri == str(tmp_path / "out")


def test_a_result_that_is_there_needs_no_routers(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan, str(tmp_path / "out"), LOCAL)
    route, events = Route(plan), Events()
    result = run_plan(plan, str(tmp_path / "out"), LOCAL, reporter=events, route=route)
    assert kinds(events) == ["planned", "already_done"]
    assert (route.num_asked, result.num_resumed) == (0, len(plan.shards))


def test_too_little_memory_is_said_before_routers_are_made(plan: Plan, tmp_path: Path) -> None:
    route = Route(plan)
    with pytest.raises(PlanError, match="memory"):
        run_plan(plan, str(tmp_path / "out"), MergeOptions(executor="local", memory_bytes=1), route=route)
    assert route.num_asked == 0
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused_before_routers_are_made(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"another's")
    route = Route(plan)
    with pytest.raises(PlanError, match="overwrite=True"):
        run_plan(plan, str(tmp_path / "out"), LOCAL, route=route)
    assert route.num_asked == 0


def test_stopping_begins_when_something_is_written(plan: Plan, tmp_path: Path) -> None:
    """Before, an interrupt raises in the ordinary way: there is nothing to clean up."""
    events, seen = Events(), []

    @contextlib.contextmanager
    def stop() -> Iterator[threading.Event]:
        seen.extend(kinds(events))
        event = threading.Event()
        event.set()
        yield event

    with pytest.raises(Interrupted):
        run_plan(plan, str(tmp_path / "out"), LOCAL, reporter=events, stop=stop(), route=Route(plan))
    assert seen == ["routing", "planned"]
