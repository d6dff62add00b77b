"""Fixtures of all tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from support.servers.s3_server import S3Server

BUCKET = "merges"

settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take minutes come first, so that no process is left with one of them at the end."""
    longest = ("ray", "s3", "slow")
    rank: dict[object, int] = {}
    for item in items:
        marks = [longest.index(mark.name) for mark in item.iter_markers() if mark.name in longest]
        rank[item.path] = min([rank.get(item.path, len(longest)), *marks])
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started at first use, with the bucket ``merges``."""
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment pointing at it."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_prefix(s3_environment: S3Server) -> str:
    """``s3://bucket/prefix``, a place nothing else uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
