"""Two merges as processes of their own, that want one output: stopped, continued and killed by a schedule."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations import run_plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.output import holder
from mergekit_ray.output.holder import Term
from mergekit_ray.output.lease import hold
from support.merging import recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.servers.s3_bucket import Bucket
from support.waiting import DEADLINE_SECONDS

TERM = Term(seconds=0.5, renew_seconds=0.1)
"""Of leases here, so that one expires while its driver is stopped."""

INDEX_FILE = "model.safetensors.index.json"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("mergekit_ray.operations.merge", "mergekit_ray.operations.write_shards", "boto3", "support.models"),
        *("mergekit_ray.storage.local.store", "mergekit_ray.storage.s3.store", "mergekit_ray.evaluation.compiled_sums"),
        *("mergekit_ray.evaluation.nodes.merge", "mergekit_ray.methods.ties", "mergekit_ray.methods.compiled.election"),
    ]
)


@dataclass(frozen=True)
class DuelSchedule:
    """What happens to two drivers.

    Attributes:
        seed: that it was drawn from.
        options: of the two, and of who merges last.
        capabilities: what ``ATEN_CPU_CAPABILITY`` tells torch of the processor, for each of the two; empty for nothing.
        stops: seconds after whose start each is stopped; None for never.
        second_begins: seconds after the first has begun.
        goes_on: seconds after its stop each goes on.
        kills: seconds after whose start each is killed; None for never.
        has_old: another model is there before.
        on_ray: who merges last does so on a Ray cluster, if there is one.
    """

    seed: int
    options: tuple[MergeOptions, ...]
    capabilities: tuple[str, ...]
    stops: tuple[float | None, float | None]
    second_begins: float
    goes_on: tuple[float, float]
    kills: tuple[float | None, float | None]
    has_old: bool
    on_ray: bool


def duel_of(seed: int) -> DuelSchedule:
    """The schedule drawn from a seed."""
    draw = random.Random(seed)

    def perhaps(chance: float, longest: float) -> float | None:
        return draw.uniform(0.0, longest) if draw.random() < chance else None

    def options() -> MergeOptions:
        memory = draw.choice([None, 400 << 20])
        return MergeOptions("local", num_workers=draw.choice([1, 2, 3]), memory_bytes=memory, overwrite=True)

    return DuelSchedule(
        seed,
        tuple(options() for _ in range(3)),
        tuple(draw.choice(["", "default"]) for _ in range(2)),
        (perhaps(0.9, 0.8), perhaps(0.4, 0.8)),
        draw.uniform(0.0, 0.8),
        (draw.uniform(0.5, 2.5), draw.uniform(0.0, 1.5)),
        (perhaps(0.15, 1.5), perhaps(0.15, 1.5)),
        draw.random() < 0.5,
        draw.random() < 0.1,
    )


class Duels:
    """Two recipes into one place, under one schedule after the other.

    Args:
        folder: of this test's own.
        library: where the models come from.
        bucket: the output is there; None for a folder.
        environment: by which the bucket's server is found.
        ray_address: of a Ray cluster, on which some of what is left undone is finished.
    """

    def __init__(
        self,
        folder: Path,
        library: ModelLibrary,
        bucket: Bucket | None,
        environment: Mapping[str, str] | None = None,
        ray_address: str | None = None,
    ) -> None:
        base, *tuned = (library.get("llama", variant) for variant in range(3))
        self._recipes = {
            "first": recipe_of("ties", base, tuned, output={"max_shard_size": 45_000}),
            "second": recipe_of("linear", base, tuned[:1], output={"max_shard_size": 60_000}),
            "old": recipe_of("linear", base, tuned, output={"max_shard_size": 52_000}),
        }
        self._folder, self._bucket, self._environment = folder, bucket, dict(environment or {})
        self._models = {name: undisturbed(recipe, folder / name) for name, recipe in self._recipes.items()}
        self._number, self._ray_address = 0, ray_address

    def run(self, schedule: DuelSchedule) -> str:
        """Have the two merge, and see that all is as it must be; how they ended, in words.

        Raises:
            AssertionError: it is not; names the schedule.
        """
        self._number += 1
        name = f"duel-{self._number}"
        out = self._prepared(name, schedule)
        codes = self._fight(schedule, out)
        found = self._files(name)
        good = [who for who, code in zip(("first", "second"), codes, strict=True) if code == 0]
        if good:
            assert any(found == self._models[who] for who in good), f"{schedule}: {codes}: none of {good} is there"
        elif INDEX_FILE in found:
            allowed = [*self._models.values()] if -signal.SIGKILL in codes else [self._models["old"]]
            assert found in allowed, f"{schedule}: {codes}: a mixture is there"
        with mock.patch.dict(os.environ, self._environment):
            self._finish(schedule, out)
        assert self._files(name) == self._models["second"], f"{schedule}: {codes}: not as undisturbed"
        left = self._left(name)
        assert not left, f"{schedule}: {codes}: {left} stay behind"
        self._discard(name)
        return " ".join("killed" if code < 0 else f"exit code {code}" if code else "published" for code in codes)

    def _fight(self, schedule: DuelSchedule, out: str) -> list[int]:
        children = [
            FORKS.Process(
                target=_merge,
                args=(self._recipes[who], out, schedule.options[i], schedule.capabilities[i], self._environment),
            )
            for i, who in enumerate(("first", "second"))
        ]
        starts = (0.0, schedule.second_begins)
        events: list[tuple[float, int, Callable[[Any], None]]] = []
        for i, (start, stop, kill) in enumerate(zip(starts, schedule.stops, schedule.kills, strict=True)):
            events.append((start, i, lambda child: child.start()))
            if stop is not None:
                events.append((start + stop, i, lambda child: _signal(child, signal.SIGSTOP)))
                events.append((start + stop + schedule.goes_on[i], i, lambda child: _signal(child, signal.SIGCONT)))
            if kill is not None:
                events.append((start + kill, i, lambda child: _signal(child, signal.SIGKILL)))
        began = time.monotonic()
        for at, i, act in sorted(events, key=lambda event: event[0]):
            time.sleep(max(0.0, began + at - time.monotonic()))
            act(children[i])
        codes = []
        for child in children:
            child.join(DEADLINE_SECONDS)
            assert child.exitcode is not None, f"{schedule}: a driver hangs"
            codes.append(child.exitcode)
        return codes

    def _finish(self, schedule: DuelSchedule, out: str) -> None:
        time.sleep(TERM.seconds)  # the lease of one that was killed expires
        options = schedule.options[2]
        if schedule.on_ray and self._ray_address is not None:
            options = replace(options, executor="ray", address=self._ray_address)
        with _short_leases():
            mergekit_ray.merge(self._recipes["second"], out, options=options)

    def _prepared(self, name: str, schedule: DuelSchedule) -> str:
        folder = self._folder / name
        if schedule.has_old:
            folder.mkdir()
            for file, data in self._models["old"].items():
                (folder / file).write_bytes(data)
        if self._bucket is None:
            return str(folder)
        return self._bucket.upload(folder, name) if schedule.has_old else f"{self._bucket.uri}/{name}"

    def _files(self, name: str) -> dict[str, bytes]:
        if self._bucket is None:
            found = contents(self._folder / name) if (self._folder / name).exists() else {}
        else:
            with tempfile.TemporaryDirectory() as copy:
                found = contents(self._bucket.download(name, Path(copy)))
        return {file: data for file, data in found.items() if not file.startswith(".")}

    def _left(self, name: str) -> list[str]:
        if self._bucket is not None:
            return [*self._bucket.unfinished(), *(key for key in self._bucket.keys(name) if key.startswith("."))]
        return [str(path) for path in (self._folder / name).rglob(".*")]

    def _discard(self, name: str) -> None:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        if self._bucket is not None:
            self._bucket.delete(name)


def _short_leases() -> Any:
    """Leases are short, and nothing is known of the processes that hold them: as on several machines."""
    return mock.patch.multiple(run_plan, hold=functools.partial(hold, term=TERM))


def _merge(
    recipe: Mapping[str, Any], out: str, options: MergeOptions, capability: str, environment: Mapping[str, str]
) -> None:
    """What a child does; its exit code is the command line's."""
    os.environ.update(environment)
    if capability:
        os.environ["ATEN_CPU_CAPABILITY"] = capability
    with _short_leases(), mock.patch.object(holder, "_processes", return_value=None):
        try:
            mergekit_ray.merge(recipe, out, options=replace(options))
        except MergekitRayError as error:
            sys.exit(error.exit_code)


def _signal(child: Any, number: int) -> None:
    if child.is_alive():
        os.kill(child.pid, number)
