"""Merges from S3 to S3 while the store fails by a schedule: each must end in the right model or a clear error."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.storage.s3 import store as s3
from mergekit_ray.storage.transfers import RetryPolicy
from support.models import ModelLibrary, contents
from support.servers.hostile_proxy import TRANSIENT, HostileProxy, Schedule
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

OPTIONS = MergeOptions(executor="local", num_workers=2)
QUICK = RetryPolicy(max_attempts=6, base_seconds=0.002, max_seconds=0.02)
"""The product's policy, but for the pauses."""

LASTING = ("expired", "denied")


def schedule_of(seed: int) -> Schedule:
    """A schedule drawn from its seed: most are of faults that pass, one in four has one that lasts."""
    draw = random.Random(seed)
    kinds = draw.sample(TRANSIENT, draw.randint(1, len(TRANSIENT)))
    total = draw.choice([0.05, 0.15, 0.4])
    rates = {kind: total / len(kinds) for kind in kinds}
    expires_after = None
    if draw.random() < 0.25:
        if draw.random() < 0.5:
            expires_after = draw.randint(1, 60)
        else:
            rates["denied"] = 0.02
    return Schedule(seed, rates, expires_after=expires_after)


def recipe_of_five_shards(bucket: Bucket, models: ModelLibrary) -> dict[str, Any]:
    """Three small models, uploaded there, and what to make of them."""
    base, *tuned = (bucket.upload(models.get("llama", variant), f"in{variant}") for variant in range(3))
    listed = [{"model": uri, "parameters": {"weight": 0.5, "density": 0.5}} for uri in tuned]
    return {"merge_method": "ties", "base_model": base, "models": listed, "output": {"max_shard_size": 45_000}}


@dataclass(frozen=True)
class Outcome:
    """How a schedule ended.

    Attributes:
        counts: faults that were made, by name.
        error: what the merge said, if it failed.
    """

    counts: Counter[str]
    error: MergekitRayError | None


class Soak:
    """Merges one recipe under one schedule after the other.

    Args:
        server: the store, which holds the inputs.
        prefix: URI of a place of its own there.
        recipe: to merge.
    """

    def __init__(self, server: S3Server, prefix: str, recipe: Mapping[str, Any]) -> None:
        self._server = server
        self._prefix = prefix
        self._recipe = recipe
        self._bucket = Bucket(server, prefix)
        self._num_runs = 0
        self._expected = self._merged("expected")

    def _merged(self, name: str) -> dict[str, bytes]:
        with mock.patch.dict(os.environ, self._server.environment):
            mergekit_ray.merge(self._recipe, f"{self._prefix}/{name}", options=OPTIONS)
        return self._stored(name)

    def _stored(self, name: str) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return contents(self._bucket.download(name, Path(folder)))

    def run(self, schedule: Schedule) -> Outcome:
        """Merge under a schedule, and see that all is as it must be.

        Raises:
            AssertionError: it is not; names the schedule.
        """
        self._num_runs += 1
        name = f"out-{self._num_runs}"
        out = f"{self._prefix}/{name}"
        error = None
        with HostileProxy(self._server.endpoint_url, schedule) as proxy:
            environment = {**self._server.environment, "AWS_ENDPOINT_URL": proxy.endpoint_url}
            with mock.patch.dict(os.environ, environment), mock.patch.object(s3, "RetryPolicy", return_value=QUICK):
                try:
                    mergekit_ray.merge(self._recipe, out, options=OPTIONS)
                except MergekitRayError as caught:
                    error = caught
            counts = proxy.counts
        lasting = [fault for fault in LASTING if counts[fault]]
        if error is None:
            assert "expired" not in lasting, f"{schedule}: merged with expired credentials"
        else:
            assert lasting, f"{schedule}: faults that pass ended the merge: {error}"
            assert error.exit_code in (3, 4), f"{schedule}: {error!r}"
            assert error.remedy, f"{schedule}: {error}"
            assert "model.safetensors.index.json" not in self._bucket.keys(name), f"{schedule}: published after {error}"
        # Undisturbed, the same command makes the same model of what is there, and nothing is left beside it.
        found = self._merged(name)
        other = {file for file in found.keys() | self._expected.keys() if found.get(file) != self._expected.get(file)}
        assert not other, f"{schedule}: not as undisturbed: {sorted(other)}"
        assert self._bucket.unfinished() == [], f"{schedule}: an upload stays behind"
        self._bucket.delete(name)
        return Outcome(counts, error)
