"""Routers that are kept beside an unfinished mixture: read as they were written, or not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_ray.operations.kept_routers import ROUTERS_FILE, Kept, KeptRouters, from_bytes, to_bytes
from mergekit_ray.output.destination import Destination
from mergekit_ray.storage.local.store import LocalStore
from support.merging import Events

DIGEST = "d1"
FOLDER = ".mergekit-ray/d1"


def some(value: float = 0.1) -> Kept:
    rows = np.array([[value, -1.5e-40, 3.0], [1.0, -0.0, 2.0]], np.float32)
    return Kept({0: rows, 11: rows + 1}, {0: rows[:1]}, {0: 0.1 + 0.2}, ["close"])


def assert_same(a: Any, b: Any) -> None:
    for name in ("vectors", "shared"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.keys() == other.keys()
        for layer in one:
            assert one[layer].dtype == other[layer].dtype == np.float32
            assert one[layer].shape == other[layer].shape
            assert one[layer].tobytes() == other[layer].tobytes()
    assert (a.lengths, a.warnings) == (b.lengths, b.warnings)


def test_what_is_written_is_read() -> None:
    assert_same(from_bytes(to_bytes(some(), DIGEST), DIGEST), some())


def rewritten(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads(to_bytes(some(), DIGEST))
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        to_bytes(some(), DIGEST)[:-9],
        to_bytes(some(), "another"),
        to_bytes(some(float("nan")), DIGEST),
        to_bytes(Kept({}, {}, {0: float("inf")}, []), DIGEST),
        rewritten(lambda data: data.update(format=2)),
        rewritten(lambda data: data["routers"]["vectors"]["0"].__setitem__(0, [3, 2])),
        rewritten(lambda data: data["routers"]["vectors"].pop("0")),
        rewritten(lambda data: data.pop("sha256")),
    ],
)
def test_what_is_not_sound_is_not_used_and_told_once(data: bytes, tmp_path: Path) -> None:
    found = Destination(LocalStore(tmp_path), FOLDER, {})
    found.sink.put(f"{FOLDER}/{ROUTERS_FILE}", data)
    events = Events()
    kept = KeptRouters(DIGEST, events)
    assert kept.look(found) is False
    made = kept.plan_with(lambda routing: routing(), some)
    assert_same(made, some())
    assert kept.look(found) is False
    assert len(events.of("warning")) == 1
    kept.write(found)
    assert_same(from_bytes(found.sink.read(f"{FOLDER}/{ROUTERS_FILE}", max_bytes=1 << 20), DIGEST), some())


def test_those_of_a_faster_driver_are_taken(tmp_path: Path) -> None:
    found = Destination(LocalStore(tmp_path), FOLDER, {})
    kept = KeptRouters(DIGEST, Events())
    assert kept.look(found) is False
    kept.plan_with(lambda routing: routing(), some)
    theirs = to_bytes(some(0.2), DIGEST)
    found.sink.put(f"{FOLDER}/{ROUTERS_FILE}", theirs)
    assert kept.look(found) is True
    assert_same(kept.plan_with(lambda routing: routing(), some), some(0.2))
    kept.write(found)
    assert found.sink.read(f"{FOLDER}/{ROUTERS_FILE}", max_bytes=1 << 20) == theirs


def test_those_that_do_not_fit_the_plan_are_made_again(tmp_path: Path) -> None:
    found = Destination(LocalStore(tmp_path), FOLDER, {})
    found.sink.put(f"{FOLDER}/{ROUTERS_FILE}", to_bytes(Kept({}, {}, {}, []), DIGEST))
    events = Events()
    kept = KeptRouters(DIGEST, events)
    assert kept.look(found) is True
    rows = kept.plan_with(lambda routing: routing().vectors[11], some)
    assert rows.tobytes() == some().vectors[11].tobytes()
    assert len(events.of("warning")) == 1
