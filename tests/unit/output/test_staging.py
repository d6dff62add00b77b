"""A model in the place of another: what is there at every moment, and that any interruption is made good."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray.output.staging
from mergekit_ray.core.errors import CheckpointError, Interrupted, PlanError, StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.output.destination import INDEX_FILE, RECORD_ROOT
from mergekit_ray.storage.local.store import LocalStore
from support.merging import Events, stop_at
from support.models import contents

OVERWRITE = MergeOptions(executor="local", overwrite=True)


class Crash(BaseException):
    """The end of the process, as far as the merge can tell."""


def merge(plan: Plan, out: Path, *, overwrite: bool = True, **more: Any) -> Events:
    events = Events()
    run_plan(plan, str(out), replace(OVERWRITE, overwrite=overwrite), reporter=events, **more)
    return events


@pytest.fixture
def other(plan: Plan) -> Plan:
    """Another plan whose shards have the same names."""
    return replace(plan, seed=99)


@pytest.fixture
def wanted(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    """What a merge into an empty folder gives."""
    merge(plan, tmp_path / "fresh")
    return contents(tmp_path / "fresh")


@pytest.fixture
def out(other: Plan, tmp_path: Path) -> Path:
    """A folder with another model and a file of the user's."""
    merge(other, tmp_path / "out")
    (tmp_path / "out" / "extra.safetensors").write_bytes(b"of the old model")
    (tmp_path / "out" / "notes.txt").write_bytes(b"of the user")
    return tmp_path / "out"


def model(folder: Path) -> dict[str, bytes]:
    """What a reader sees."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(RECORD_ROOT)}


def assert_new(out: Path, wanted: dict[str, bytes]) -> None:
    assert contents(out) == {**wanted, "notes.txt": b"of the user"}
    assert not (out / RECORD_ROOT).exists()


def test_the_old_model_stays_until_the_new_one_is_whole(out: Path, plan: Plan, wanted: dict[str, bytes]) -> None:
    before = model(out)
    seen: list[tuple[str, bool]] = []

    def look(kind: str) -> None:
        seen.append((kind, model(out) == before))

    run_plan(plan, str(out), OVERWRITE, reporter=Events(look))
    assert seen == [
        ("planned", True),
        *[("shard_done", True)] * 3,
        ("checking", True),
        ("publishing", True),
        ("replacing", True),
        ("published", False),
    ]
    assert_new(out, wanted)


def test_a_reader_sees_one_model_or_none(
    out: Path, plan: Plan, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model(out)
    seen = []
    for name in ("delete", "move", "put"):
        unwatched = getattr(LocalStore, name)

        def watched(*args: Any, unwatched: Callable[..., Any] = unwatched, **kwargs: Any) -> Any:
            result = unwatched(*args, **kwargs)
            found = model(out)
            if INDEX_FILE not in found:
                seen.append("none")
            else:
                seen.append(
                    "old" if found == old else "new" if found == {**wanted, "notes.txt": b"of the user"} else "?"
                )
            return result

        monkeypatch.setattr(LocalStore, name, watched)
    merge(plan, out)
    assert [state for state, _ in itertools.groupby(seen)] == ["old", "none", "new"]


def test_a_merge_that_fails_leaves_the_old_model(out: Path, plan: Plan, wanted: dict[str, bytes]) -> None:
    before = model(out)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        run_plan(plan, str(out), OVERWRITE, reporter=stop_at(stop, "shard_done"), stop=stop)
    assert model(out) == before
    with pytest.raises(PlanError, match="overwrite=True"):
        merge(plan, out, overwrite=False)
    events = merge(plan, out)
    [resumed] = events.of("resumed")
    assert resumed["num_done"] in {1, 2}, "the one that was told of, and perhaps the next"
    assert len(events.of("shard_done")) == 3 - resumed["num_done"]
    assert_new(out, wanted)


def test_a_stop_at_the_last_moment_leaves_the_old_model(out: Path, plan: Plan, wanted: dict[str, bytes]) -> None:
    before, stop = model(out), threading.Event()

    with pytest.raises(Interrupted):
        run_plan(plan, str(out), OVERWRITE, reporter=stop_at(stop, "publishing"), stop=stop)
    assert model(out) == before
    assert merge(plan, out).of("shard_done") == []
    assert_new(out, wanted)


def test_a_third_plan_takes_the_place_of_both(out: Path, plan: Plan, wanted: dict[str, bytes]) -> None:
    before, stop = model(out), threading.Event()
    with pytest.raises(Interrupted):
        run_plan(replace(plan, seed=5), str(out), OVERWRITE, reporter=stop_at(stop, "shard_done"), stop=stop)
    assert model(out) == before
    merge(plan, out)
    assert_new(out, wanted)


def crashes(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], bool]:
    """Have the process end before its ``at``-th change to the output while it swaps; tells whether it came to that."""
    count = itertools.count()
    reached = [False]

    def until(name: str) -> Callable[..., Any]:
        unharmed = getattr(LocalStore, name)

        def harmed(self: LocalStore, names: Any, *args: Any, **kwargs: Any) -> Any:
            # File by file: it may end between any two.
            parts = [{k: v} for k, v in names.items()] if name == "move" else [[each] for each in names]
            for part in [names] if name == "put" else parts:
                if next(count) == at:
                    reached[0] = True
                    raise Crash
                unharmed(self, part, *args, **kwargs)

        return harmed

    def swap(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("delete", "move", "put"):
                patch.setattr(LocalStore, name, until(name))
            unharmed_swap(*args)

    unharmed_swap = mergekit_ray.output.staging.swap
    monkeypatch.setattr("mergekit_ray.operations.run_plan.swap", swap)
    return lambda: reached[0]


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_crash_at_any_moment_of_the_swap_is_made_good(
    out: Path, plan: Plan, wanted: dict[str, bytes], asked_again: bool, tmp_path: Path
) -> None:
    before = model(out)
    whole = {**wanted, "notes.txt": b"of the user"}
    for at in itertools.count():
        LocalStore(out).delete([file.name for file in LocalStore(out).list()])
        for name, data in before.items():
            (out / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            has_crashed = crashes(patch, at)
            with contextlib.suppress(Crash):
                merge(plan, out)
        if not has_crashed():
            break
        found = model(out)
        assert found in (before, whole) or INDEX_FILE not in found
        # Nothing of the new model is lost, whatever is gone of the old one.
        staged = {Path(name).name: data for name, data in contents(out).items() if "/staged/" in name}
        assert {**found, **staged}.items() >= wanted.items()
        # Before the swap has begun in earnest, the old model is still protected.
        again = asked_again or found == before
        assert merge(plan, out, overwrite=again).of("shard_done") == []
        assert_new(out, wanted)
    assert at > 2 * len(wanted)
    assert_new(out, wanted)


def test_a_shard_that_does_not_come_is_noticed_before_the_index(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = LocalStore.move

    def lose(self: LocalStore, names: dict[str, str]) -> None:
        move(self, names)
        if any(new == plan.shards[1].file for new in names.values()):
            (out / plan.shards[1].file).write_bytes(b"short")

    monkeypatch.setattr(LocalStore, "move", lose)
    with pytest.raises(StorageError, match="did not come where it belongs"):
        merge(plan, out)
    assert INDEX_FILE not in model(out)


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[]", b"[" * 99999, b"\xff"]
    + [b'{"goes": %s, "comes": []}' % goes for goes in (b"3", b'"notes.txt"', b"[[]]", b'{"a": 1}')],
)
def test_a_damaged_note_is_told(out: Path, plan: Plan, damage: bytes) -> None:
    place = out / RECORD_ROOT / plan.digest
    place.mkdir(parents=True)
    (place / "swap.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="not what was written"):
        merge(plan, out)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "thesis.docx", "deep/model.safetensors", "other/config.json", "/etc/passwd", "../x.safetensors"),
        *(".mergekit-ray/lease.json", ".mergekit-ray/../notes.txt", ".mergekit-ray/{digest}/plan.json", "", "a\0.json"),
    ],
)
def test_a_note_of_somebody_elses_deletes_nothing(out: Path, plan: Plan, name: str) -> None:
    before = contents(out)
    name = name.format(digest=plan.digest)
    note = out / RECORD_ROOT / plan.digest / "swap.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"format": 1, "goes": ["config.json", name], "comes": []}))
    with pytest.raises(CheckpointError, match="is not a file of a model") as caught:
        merge(plan, out)
    assert repr(name) in caught.value.what
    assert caught.value.where == str(note)
    assert "delete it, and merge again" in str(caught.value.remedy)
    note.unlink()
    note.parent.rmdir()
    note.parent.parent.rmdir()
    assert contents(out) == before


def test_another_plans_unfinished_work_makes_room_at_once(plan: Plan, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out, stop = tmp_path / "work", threading.Event()
    with pytest.raises(Interrupted):
        run_plan(replace(plan, seed=5), str(out), OVERWRITE, reporter=stop_at(stop, "shard_done"), stop=stop)
    assert any((out / shard.file).exists() for shard in plan.shards)
    seen: list[Sequence[str]] = []
    run_plan(plan, str(out), OVERWRITE, reporter=Events(lambda kind: seen.append(sorted(contents(out)))))
    assert not any("/staged/" in name for names in seen for name in names)
    assert contents(out) == wanted


def test_notes_beside_a_complete_model_are_tidied_up(plan: Plan, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "work"
    merge(plan, out)
    (out / RECORD_ROOT / plan.digest).mkdir(parents=True)
    (out / RECORD_ROOT / plan.digest / "plan.json").write_text("{}")
    assert merge(plan, out, overwrite=False).of("shard_done") == []
    assert contents(out) == wanted


@pytest.fixture(autouse=True)
def lease_goes(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.rglob("lease.json")) == []
