"""Two drivers as processes, that are stopped, continued and killed at random: some of what the soak runs at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.failures.duel import Duels, duel_of
from support.models import ModelLibrary
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server


def test_on_a_disk(models: ModelLibrary, tmp_path: Path) -> None:
    duels = Duels(tmp_path, models, None)
    for seed in range(6):
        duels.run(duel_of(seed))


@pytest.mark.s3
def test_on_s3(models: ModelLibrary, tmp_path: Path, s3_environment: S3Server, s3_prefix: str) -> None:
    duels = Duels(tmp_path, models, Bucket(s3_environment, s3_prefix), s3_environment.environment)
    for seed in range(100, 104):
        duels.run(duel_of(seed))
