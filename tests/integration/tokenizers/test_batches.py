"""Long approximations: batches of rows that workers share, and that a rerun finds done. The model is the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray import MergeOptions, TransplantOptions
from mergekit_ray.core.errors import Interrupted
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations import run_plan
from mergekit_ray.planning.beforehand.batches import batches_of
from mergekit_ray.reporting.reporters import SilentReporter
from support.models import contents
from support.servers.hub_server import TOKEN, serving
from support.servers.hub_writing import WritableHubServer
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import BYTES, byte_level, save_model

OURS = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]
THEIRS = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "n"), ("l", "l"), ("ll", "o"), ("a", "n"), ("an", "d")]
LOCAL = MergeOptions(executor="local", device="cpu")
WANTED = TransplantOptions(k=4)
ROWS = 2
NUM_BATCHES = 6
"""Three of each matrix: six tokens are missing, of which a batch has two."""


class Events(SilentReporter):
    """Keeps every event; ``stop`` is set once so many shards are done."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.stop = threading.Event()
        self._left = stop_after

    def event(self, kind: str, message: str, **fields: Any) -> None:
        self.found.append((kind, fields))
        self._left -= kind == "shard_done"
        if self._left <= 0:
            self.stop.set()

    def done(self) -> list[str]:
        return [fields["file"] for kind, fields in self.found if kind == "shard_done"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 12, "num_attention_heads": 3}
    donor = byte_level(["<|im_start|>"], THEIRS, BYTES[::-1])
    return {
        "model": save_model(root / "model", byte_level([], OURS), 1),
        "donor": save_model(root / "donor", donor, 2, **wide),
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is written where nothing is cut."""
    out = tmp_path_factory.mktemp("expected") / "out"
    mergekit_ray.transplant(folders["model"], folders["donor"], out, WANTED, LOCAL, progress=False)
    return contents(out)


@pytest.fixture
def _cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few rows."""
    monkeypatch.setattr(run_plan, "batches_of", partial(batches_of, batch_work=1.0, batch_rows=ROWS))


def transplant(
    folders: dict[str, Any],
    out: Any,
    options: MergeOptions = LOCAL,
    events: Events | None = None,
    wanted: TransplantOptions = WANTED,
) -> None:
    tell = events or Events()
    mergekit_ray.transplant(folders["model"], folders["donor"], out, wanted, options, reporter=tell, stop=tell.stop)


@pytest.mark.usefixtures("_cut")
def test_the_same_files(folders: dict[str, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    events = Events()
    transplant(folders, tmp_path / "out", events=events)
    assert contents(tmp_path / "out") == expected
    assert sum(file.startswith("rows-") for file in events.done()) == NUM_BATCHES
    assert not list((tmp_path / "out").glob(".mergekit-ray/*/rows"))


@pytest.mark.usefixtures("_cut")
def test_a_rerun_goes_on_with_the_batch_it_was_at(
    folders: dict[str, Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    first, second = Events(stop_after=2), Events()
    with pytest.raises(Interrupted):
        transplant(folders, tmp_path / "out", events=first)
    transplant(folders, tmp_path / "out", events=second)
    assert contents(tmp_path / "out") == expected
    assert not set(first.done()) & set(second.done())
    (num_done,) = [fields["num_done"] for kind, fields in second.found if kind == "beforehand"]
    assert num_done >= len(first.done())
    assert num_done + sum(file.startswith("rows-") for file in second.done()) == NUM_BATCHES


@pytest.mark.usefixtures("_cut")
def test_a_rerun_needs_no_batches_once_the_rows_are_written(folders: dict[str, Path], tmp_path: Path) -> None:
    first, second, third = Events(stop_after=NUM_BATCHES + 1), Events(), Events()
    options = MergeOptions(executor="local", device="cpu", num_workers=1)
    wanted = TransplantOptions(k=4, max_shard_size=1)
    with pytest.raises(Interrupted):
        transplant(folders, tmp_path / "out", options, first, wanted)
    assert [file for file in first.done() if not file.startswith("rows-")]
    transplant(folders, tmp_path / "out", options, second, wanted)
    assert not [file for file in second.done() if file.startswith("rows-")]
    transplant(folders, tmp_path / "apart", options, third, wanted)
    assert contents(tmp_path / "out") == contents(tmp_path / "apart")


@pytest.mark.usefixtures("_cut")
def test_another_model_is_replaced(folders: dict[str, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    """Made beside it first, batches too."""
    out = tmp_path / "out"
    mergekit_ray.merge(
        {"merge_method": "passthrough", "models": [{"model": str(folders["donor"])}]}, out, options=LOCAL
    )
    transplant(folders, out, MergeOptions(executor="local", device="cpu", overwrite=True))
    assert contents(out) == expected


@pytest.mark.usefixtures("_cut")
def test_within_a_merge(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"model": str(folders["model"]), "parameters": {"weight": weight}} for weight in (0.3, 0.7)]
    tokenizer = {"source": str(folders["donor"]), "approximate": {"method": "omp", "k": 4}}
    recipe = {"merge_method": "linear", "models": models, "tokenizer": tokenizer}
    events = Events()
    mergekit_ray.merge(recipe, tmp_path / "cut", options=LOCAL, reporter=events)
    assert sum(file.startswith("rows-") for file in events.done()) == NUM_BATCHES
    monkeypatch.setattr(run_plan, "batches_of", lambda _: None)
    mergekit_ray.merge(recipe, tmp_path / "whole", options=LOCAL)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.usefixtures("_cut")
def test_ray_workers_share_them_from_s3_to_s3(
    folders: dict[str, Path], expected: dict[str, bytes], s3_environment: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    bucket, events = Bucket(s3_environment, s3_prefix), Events()
    places = {name: bucket.upload(folder, name) for name, folder in folders.items()}
    with RayCluster(num_nodes=2):
        transplant(places, f"{bucket.uri}/out", MergeOptions(executor="ray", num_workers=2), events)
    found = contents(bucket.download("out", tmp_path / "out"))
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert {name: found[name] for name in weights} == {name: expected[name] for name in weights}
    assert found.keys() == expected.keys()
    assert sum(file.startswith("rows-") for file in events.done()) == NUM_BATCHES


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHubServer]:
    with serving(WritableHubServer(), monkeypatch, tmp_path / "home", token=TOKEN) as server:
        yield server


@pytest.mark.usefixtures("_cut", "hub")
def test_nothing_is_cut_for_the_hub(folders: dict[str, Path]) -> None:
    """Nobody could read a batch there before the commit."""
    events = Events()
    transplant(folders, "hf://org/out", events=events)
    assert not [file for file in events.done() if file.startswith("rows-")]


def plan_of(folders: dict[str, Path], **wanted: Any) -> Plan:
    tokenizer = {"source": str(folders["donor"]), "approximate": wanted}
    models = [{"model": str(folders["model"])}]
    return mergekit_ray.plan({"merge_method": "passthrough", "models": models, "tokenizer": tokenizer})


@pytest.mark.parametrize("method", ["landmark_pca", "mean", "randn", "subword"])
def test_what_is_quick_is_not_cut(method: str, folders: dict[str, Path]) -> None:
    assert batches_of(plan_of(folders, method=method), batch_work=1.0, batch_rows=1) is None


def test_a_batch_is_of_so_much_work(folders: dict[str, Path]) -> None:
    """262 shared tokens of width 12, 4 of them chosen: 25 152 operations a row."""
    plan = plan_of(folders, method="omp", k=4)
    assert batches_of(plan) is None
    for work, num_rows in ((25_152 * 2.2, [2, 2, 2]), (25_152 * 4.0, [4, 2]), (1.0, [1] * 6)):
        found = batches_of(plan, batch_work=work, batch_rows=1)
        assert found is not None
        sizes = [[shard.tensors[0].spec.shape[0] for shard in shards] for shards in found.parts.values()]
        assert sizes == [num_rows, num_rows]
