"""Two drivers, one output: whoever is stopped at whatever moment and goes on, a reader finds one model, whole, or none.

The drivers run the real code on a real folder and a real S3 server. Each is stopped right before any of the changes
that it makes to the store, as long as it takes the other to do its work, or part of it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.output.destination import INDEX_FILE
from support.failures.two_drivers import Driver, Schedule
from support.merging import recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

LOCAL = MergeOptions(executor="local", num_workers=1)
ALL = "MERGEKIT_RAY_ALL_INTERLEAVINGS" in os.environ
"""All of them (`make fencing`, half an hour), or some that are drawn."""

SEED = int(os.environ.get("MERGEKIT_RAY_FENCING_SEED", "0"))
"""Of what is drawn."""


@dataclass(frozen=True)
class Recipes:
    """What is merged.

    Attributes:
        recipes: of two drivers, and of what is there before, if anything is: ``first``, ``second``, ``old``. Their
            models' shards have unlike numbers.
        models: what they give.
    """

    recipes: Mapping[str, Any]
    models: Mapping[str, Mapping[str, bytes]]


@pytest.fixture(scope="module")
def recipes(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    base, *tuned = (models.get("llama", variant, num_layers=2) for variant in range(3))
    found = {
        "first": recipe_of("linear", base, tuned, output={"max_shard_size": 30_000}),
        "second": recipe_of("slerp", base, tuned[:1], output={"max_shard_size": 45_000}),
        "old": recipe_of("linear", base, tuned[:1], output={"max_shard_size": 38_000}),
    }
    folder = tmp_path_factory.mktemp("fencing")
    return Recipes(found, {name: undisturbed(recipe, folder / name) for name, recipe in found.items()})


class Place:
    """An output, as a folder or on S3, filled as a case wants it."""

    def __init__(self, root: Path, bucket: Bucket | None) -> None:
        self._root, self._bucket = root, bucket
        self._numbers = itertools.count()

    def make(self, old: Mapping[str, bytes]) -> str:
        name = f"out{next(self._numbers)}"
        self._name = name
        folder = self._root / name
        if old:
            folder.mkdir(parents=True)
            for file, data in old.items():
                (folder / file).write_bytes(data)
        if self._bucket is None:
            return str(folder)
        return self._bucket.upload(folder, name) if old else f"{self._bucket.uri}/{name}"

    def files(self) -> dict[str, bytes]:
        """All that a reader sees."""
        if self._bucket is None:
            found = contents(self._root / self._name)
        else:
            copy = self._root / f"copy-{self._name}"
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            found = contents(self._bucket.download(self._name, copy))
        return {name: data for name, data in found.items() if not name.startswith(".")}

    def left(self) -> list[str]:
        """What nobody should leave."""
        if self._bucket is not None:
            return [*self._bucket.unfinished(), *(key for key in self._bucket.keys(self._name) if key[0] == ".")]
        return [str(path) for path in (self._root / self._name).rglob("*") if ".tmp" in path.name]

    def discard(self) -> None:
        if self._bucket is None:
            shutil.rmtree(self._root / self._name, ignore_errors=True)
        else:
            self._bucket.delete(self._name)


@pytest.fixture
def folder_place(tmp_path: Path) -> Place:
    return Place(tmp_path, None)


@pytest.fixture
def s3_place(tmp_path: Path, s3_environment: S3Server, s3_prefix: str) -> Place:
    return Place(tmp_path, Bucket(s3_environment, s3_prefix))


class Case:
    """Two merges into a place: the one of the second recipe may replace what it finds.

    Args:
        has_old: a model is there before, which the first is to replace too.
    """

    def __init__(self, place: Place, recipes: Recipes, *, has_old: bool) -> None:
        self.place, self._recipes, self._has_old = place, recipes, has_old

    def begin(self) -> tuple[Schedule, Driver, Driver]:
        self._out = self.place.make(self._recipes.models["old"] if self._has_old else {})
        return Schedule(), self._driver("first", overwrite=self._has_old), self._driver("second", overwrite=True)

    def _driver(self, name: str, *, overwrite: bool) -> Driver:
        options = replace(LOCAL, overwrite=overwrite)
        return Driver(lambda: mergekit_ray.merge(self._recipes.recipes[name], self._out, options=options))

    def num_changes(self) -> int:
        """Of the first alone."""
        schedule, first, _ = self.begin()
        with schedule.armed():
            schedule.run(first)
        assert first.is_published
        assert self.place.files() == self._recipes.models["first"]
        self.place.discard()
        return first.number

    def is_there(self, name: str) -> bool:
        """Whether a reader finds this model."""
        return self.place.files() == self._recipes.models[name]

    def check(self, first: Driver, second: Driver, what: str) -> None:
        """See that a reader finds one model or none: that of the one that held the lease last and published."""
        found, models = self.place.files(), self._recipes.models
        published = {
            driver.lease: name for driver, name in ((first, "first"), (second, "second")) if driver.is_published
        }
        if published:
            assert found == models[published[max(published)]], what
        elif INDEX_FILE in found:
            assert found == models["old"], what

    def finish(self, what: str) -> None:
        """Whatever was left, merging once more ends well, and leaves nothing else."""
        options = replace(LOCAL, overwrite=True)
        mergekit_ray.merge(self._recipes.recipes["second"], self._out, options=options)
        assert self.place.files() == self._recipes.models["second"], what
        assert self.place.left() == [], what
        self.place.discard()


def stopped_once(case: Case, k: int) -> None:
    """The first is stopped before its change ``k``, the second does all its work, and the first goes on."""
    what = f"the first was stopped before its change {k}"
    schedule, first, second = case.begin()
    with schedule.armed():
        schedule.run(first, k)
        is_there = case.is_there("first")
        schedule.run(second)
        if not first.has_ended:
            assert second.is_published or "locked" in str(second.outcome), (what, second.outcome)
            case.check(first, second, what)
            schedule.run(first)
            # If it had the lease, then whatever it was about to do, and had been told that it may, is refused.
            assert is_there or not (first.is_published and first.lease < second.lease), what
    case.check(first, second, what)
    case.finish(what)


def stopped_twice(case: Case, k: int, j: int) -> None:
    """The second is stopped as well, before its change ``j``, while the first goes on to its end."""
    what = f"the first was stopped before its change {k}, the second before its change {j}"
    schedule, first, second = case.begin()
    with schedule.armed():
        schedule.run(first, k)
        schedule.run(second, j)
        schedule.run(first)
        if not second.has_ended:
            schedule.run(second)
    case.check(first, second, what)
    case.finish(what)


def drawn(numbers: range, count: int) -> list[int]:
    return list(numbers) if ALL or len(numbers) <= count else sorted(random.Random(SEED).sample(numbers, count))


@pytest.fixture(params=[False, True], ids=["into an empty place", "over a model"])
def has_old(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_on_a_disk_a_driver_that_was_stopped_changes_nothing(
    folder_place: Place, recipes: Recipes, has_old: bool
) -> None:
    case = Case(folder_place, recipes, has_old=has_old)
    for k in drawn(range(1, case.num_changes() + 1), 30):
        stopped_once(case, k)


def test_on_a_disk_two_drivers_that_were_stopped_mix_nothing(
    folder_place: Place, recipes: Recipes, has_old: bool
) -> None:
    case = Case(folder_place, recipes, has_old=has_old)
    num_changes = case.num_changes()
    pairs = [(k, j) for k in range(1, num_changes + 1) for j in range(1, num_changes + 20)]
    for number in drawn(range(len(pairs)), 30):
        stopped_twice(case, *pairs[number])


@pytest.mark.s3
def test_on_s3_a_driver_that_was_stopped_changes_nothing(s3_place: Place, recipes: Recipes, has_old: bool) -> None:
    case = Case(s3_place, recipes, has_old=has_old)
    for k in drawn(range(1, case.num_changes() + 1), 7):
        stopped_once(case, k)


@pytest.mark.s3
def test_on_s3_two_drivers_that_were_stopped_mix_nothing(s3_place: Place, recipes: Recipes, has_old: bool) -> None:
    case = Case(s3_place, recipes, has_old=has_old)
    num_changes = case.num_changes()
    pairs = [(k, j) for k in range(1, num_changes + 1) for j in range(1, num_changes + 20)]
    # All would take a day: every fourth in each direction.
    chosen = [(k, j) for k, j in pairs if k % 4 == 1 and j % 4 == 1] if ALL else pairs
    for number in drawn(range(len(chosen)), 7):
        stopped_twice(case, *chosen[number])
