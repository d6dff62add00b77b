"""Stages that do not fit into a worker's memory together: earlier ones are computed first, to the same bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray import MergeOptions
from mergekit_ray.cli.commands import app
from mergekit_ray.core.errors import Interrupted, PlanError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.operations import run_plan
from mergekit_ray.planning.beforehand.stages import in_order, least_memory, stages_apart
from mergekit_ray.planning.windows import memory_needed
from mergekit_ray.reporting.reporters import SilentReporter
from support.models import contents
from support.servers.hub_server import TOKEN, serving
from support.servers.hub_writing import WritableHubServer
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import byte_level, save_model


class Events(SilentReporter):
    """Keeps what is computed first, and which shards were written; sets ``stop`` after so many."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.beforehand: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.stop = threading.Event()
        self._stop_after = stop_after

    def event(self, kind: str, message: str, **fields: Any) -> None:
        if kind == "beforehand":
            self.beforehand.append(fields)
        elif kind == "shard_done":
            self.done.append(fields["file"])
            if len(self.done) >= self._stop_after:
                self.stop.set()

    @property
    def done_first(self) -> list[str]:
        return [file for file in self.done if file.startswith("stages-")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    return {
        name: save_model(root / name, byte_level(), seed, dtype=torch.bfloat16, **wide)
        for seed, name in enumerate("abc")
    }


def recipe_of(places: dict[str, Any]) -> dict[str, Any]:
    """Three stages deep: trimmed changes of a trimmed merge of a trimmed merge, whose tensors are wanted whole."""

    def ties(name: str | None, base: Any, *models: Any) -> dict[str, Any]:
        entries = [{"model": str(model), "parameters": {"weight": 0.7, "density": 0.6}} for model in models]
        named = {} if name is None else {"name": name}
        return {**named, "merge_method": "ties", "base_model": str(base), "models": entries, "dtype": "bfloat16"}

    a, b, c = (places[name] for name in "abc")
    return {"stages": [ties("first", a, b, c), ties("second", b, "first", c), ties(None, a, "second", "first", b)]}


@pytest.fixture(scope="module")
def planned(folders: dict[str, Path]) -> Plan:
    return mergekit_ray.plan(recipe_of(folders))


@pytest.fixture(scope="module")
def little(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The least budget that does."""
    return least_memory(planned, str(tmp_path_factory.mktemp("nowhere")))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is written with all the memory that is asked for."""
    out = tmp_path_factory.mktemp("expected") / "out"
    merge(folders, out)
    return contents(out)


def invoke(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def merge(places: dict[str, Any], out: Any, events: Events | None = None, **options: Any) -> Events:
    tell = events or Events()
    chosen = MergeOptions(**{"executor": "local", "device": "cpu", **options})
    mergekit_ray.merge(recipe_of(places), out, options=chosen, reporter=tell, stop=tell.stop)
    return tell


def test_a_budget_in_which_everything_fits_takes_nothing_out(planned: Plan) -> None:
    assert stages_apart(planned, memory_needed(planned)) is None
    assert in_order(planned, memory_needed(planned), "") == [planned]


def test_the_least_memory_is_less_and_a_byte_less_is_refused(
    planned: Plan, little: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert little < memory_needed(planned)
    with pytest.raises(PlanError, match="too small") as found:
        merge(folders, tmp_path / "out", memory_bytes=little - 1)
    assert not (tmp_path / "out").exists()
    assert "memory_bytes=" in str(found.value.remedy)


def test_the_same_bytes(
    folders: dict[str, Path], expected: dict[str, bytes], planned: Plan, little: int, tmp_path: Path
) -> None:
    events = merge(folders, tmp_path / "out", memory_bytes=little)
    assert contents(tmp_path / "out") == expected
    own = stages_apart(planned, little)
    assert own is not None
    assert len(events.done_first) >= len(own.plan.shards)
    assert events.beforehand
    assert not list((tmp_path / "out").glob(".mergekit-ray/*/stages"))


def test_a_stage_of_a_stage_is_computed_before_it(planned: Plan) -> None:
    """With the least memory: what the last stage merges, and before that what this merges."""
    plans = in_order(planned, 0, "")
    assert len(plans) >= 3
    assert not [tensor for plan in plans for tensor in _nested(plan)]


def _nested(plan: Plan) -> Iterator[str]:
    """Tensors that hold a merge below another."""
    own = stages_apart(plan, 0)
    if own is not None:
        yield from own.files


def test_only_what_does_not_fit_is_taken_out(planned: Plan, little: int) -> None:
    budgets = sorted({little, *range(little, memory_needed(planned) + 1, 1024)})
    sizes = [0 if (own := stages_apart(planned, each)) is None else len(own.plan.shards) for each in budgets]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2


def test_the_plan_says_so(folders: dict[str, Path], planned: Plan, tmp_path: Path) -> None:
    recipe = tmp_path / "stages.yml"
    recipe.write_text(yaml.safe_dump(recipe_of(folders)))
    least, needed = least_memory(planned), memory_needed(planned)
    without, full, little = (
        invoke("plan", recipe, *memory).stdout for memory in ((), ("--memory", f"{needed}B"), ("--memory", f"{least}B"))
    )
    differs = format_bytes(needed) != format_bytes(least)
    assert (
        f"({format_bytes(needed)} unless earlier stages are computed first)" in " ".join(without.split())
    ) == differs
    assert "Everything fits into" in full
    before = in_order(planned, least)[:-1]
    size, count = sum(each.num_bytes for each in before), sum(len(s.tensors) for each in before for s in each.shards)
    assert f"{count} tensors of earlier stages ({format_bytes(size)}) are computed first" in " ".join(little.split())
    told = json.loads(invoke("plan", recipe, "--json", "--memory", f"{least}B").stdout)
    assert (told["beforehand_bytes"], told["min_memory_bytes"]) == (size, least)
    refused = invoke("plan", recipe, "--memory", f"{least - 1}B")
    assert refused.exit_code == 2
    assert "pass --memory" in refused.stderr


def test_less_memory_than_the_plan_asks_for_is_what_there_is(
    folders: dict[str, Path], expected: dict[str, bytes], little: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "total_memory", lambda: little)
    assert merge(folders, tmp_path / "out").done_first
    assert contents(tmp_path / "out") == expected
    monkeypatch.setattr(run_plan, "total_memory", lambda: 1)
    assert merge(folders, tmp_path / "least").done_first
    assert contents(tmp_path / "least") == expected


def test_a_rerun_goes_on_where_it_was(
    folders: dict[str, Path], expected: dict[str, bytes], little: int, tmp_path: Path
) -> None:
    first, second = Events(stop_after=2), Events()
    with pytest.raises(Interrupted):
        merge(folders, tmp_path / "out", first, memory_bytes=little)
    merge(folders, tmp_path / "out", second, memory_bytes=little)
    assert contents(tmp_path / "out") == expected
    assert first.done
    assert sum(fields["num_done"] for fields in second.beforehand) >= len(first.done)


def test_another_budget_finishes_it(
    folders: dict[str, Path], expected: dict[str, bytes], little: int, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        merge(folders, tmp_path / "out", Events(stop_after=2), memory_bytes=little)
    merge(folders, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_another_model_is_replaced(
    folders: dict[str, Path], expected: dict[str, bytes], little: int, tmp_path: Path
) -> None:
    models = [{"model": str(folders["b"])}]
    mergekit_ray.merge({"merge_method": "passthrough", "models": models}, tmp_path / "out")
    merge(folders, tmp_path / "out", memory_bytes=little, overwrite=True)
    assert contents(tmp_path / "out") == expected


@pytest.mark.s3
@pytest.mark.ray
def test_ray_workers_share_them_from_s3_to_s3(
    folders: dict[str, Path],
    expected: dict[str, bytes],
    s3_environment: S3Server,
    s3_prefix: str,
    tmp_path: Path,
) -> None:
    bucket = Bucket(s3_environment, s3_prefix)
    places = {name: bucket.upload(folder, name) for name, folder in folders.items()}
    least = least_memory(mergekit_ray.plan(recipe_of(places)), f"{bucket.uri}/out")
    with RayCluster(num_nodes=2):
        events = merge(places, f"{bucket.uri}/out", executor="ray", num_workers=2, memory_bytes=least)
    found = contents(bucket.download("out", tmp_path / "out"))
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert {name: found[name] for name in weights} == {name: expected[name] for name in weights}
    assert found.keys() == expected.keys()
    assert events.done_first


def test_of_the_hub_nothing_can_be_read_back(
    folders: dict[str, Path], little: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        serving(WritableHubServer(), monkeypatch, tmp_path / "home", token=TOKEN),
        pytest.raises(PlanError, match="too small"),
    ):
        merge(folders, "hf://org/out", memory_bytes=little)
