"""What Prometheus gets to see of a merge on Ray, and that the dashboard asks for just that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from mergekit_ray.executors.ray_metrics import METRICS, OUTPUT
from mergekit_ray.operations.options import MergeOptions
from support.merging import Background, recipe_of
from support.models import ModelLibrary
from support.servers.ray_head import RayHead
from support.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
BUDGET_BYTES = 600_000_000
_SAMPLE = re.compile(r"(?P<name>ray_merge_\w+)\{(?P<tags>.*)\} (?P<value>\S+)")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    """A node that this process is connected to, and that receives metrics twice a second."""
    import ray

    often = {"RAY_metrics_report_interval_ms": "500"}
    with RayHead(environment=often) as head:
        for name, value in {**often, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            monkeypatch.setenv(name, value)
        ray.init(address=head.address, log_to_driver=False, logging_level="error")
        try:
            yield head
        finally:
            ray.shutdown()


def samples(page: str, output: str) -> dict[str, float]:
    """The metrics of one merge, by name."""
    found = (_SAMPLE.fullmatch(line) for line in page.splitlines())
    return {
        match["name"]: float(match["value"])
        for match in found
        if match is not None and f'{OUTPUT}="{output}"' in match["tags"]
    }


def test_a_merge_is_counted(head: RayHead, models: ModelLibrary, tmp_path: Path) -> None:
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"max_shard_size": 45_000})
    out = str(tmp_path / "out")
    running = Background(
        recipe, tmp_path / "out", MergeOptions(executor="ray", memory_bytes=BUDGET_BYTES, num_workers=2)
    )
    found: dict[str, float] = {}

    def all_told() -> bool:
        # Gauges are reported for as long as they are set, counters for good.
        found.update(samples(head.get(head.metrics), out))
        return not running.is_running and found.get("ray_merge_shards_done_total") == len(running.result().plan.shards)

    wait_until(all_told, every=0.1)
    plan = running.result().plan
    exact = {
        "ray_merge_read_bytes_total": plan.read_bytes,
        "ray_merge_written_bytes_total": sum(shard.num_bytes - len(shard.header) for shard in plan.shards),
        "ray_merge_tensors_total": sum(len(shard.tensors) for shard in plan.shards),
        "ray_merge_shards_left": 0,
        "ray_merge_workers": 2,
        "ray_merge_workers_busy": 0,
        "ray_merge_worker_budget_bytes": BUDGET_BYTES,
    }
    assert {name: found[name] for name in exact} == exact
    assert 0 <= found["ray_merge_held_bytes"] <= 2 * BUDGET_BYTES
    for name in ("read", "compute", "write"):
        assert found[f"ray_merge_{name}_seconds_total"] > 0
    # Counters that stayed at zero are not told.
    silent = {"ray_merge_shards_failed_total", "ray_merge_workers_lost_total", "ray_merge_fetched_bytes_total"}
    assert {metric.exported for metric in METRICS} - silent <= set(found)


def test_the_dashboard_shows_each_metric_and_no_other() -> None:
    text = DASHBOARD.read_text()
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"ray_merge_\w+", expression)}
    assert asked == {metric.exported for metric in METRICS}


def test_grafana_understands_all_of_the_dashboard() -> None:
    """Read by the models that Grafana publishes, and written again by them, nothing is lost or changed."""
    plugins.register_default_plugins()
    dashboard = json.loads(DASHBOARD.read_text())
    read = Dashboard.from_json(dashboard)
    again = json.loads(JSONEncoder().encode(read))
    assert read.title == dashboard["title"]
    assert list(lost(dashboard, again)) == []


def lost(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """Where a value is missing or another; ``definition`` only shows the query of a variable to people."""
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if key != "definition":
                yield from [f"{path}.{key}"] if key not in ours else lost(value, ours[key], f"{path}.{key}")
    elif isinstance(theirs, list):
        assert len(theirs) == len(ours)
        for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif theirs != ours:
        yield path
