from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, errors

from mergekit_ray.core.errors import ConfigError, ModelError, StorageError
from mergekit_ray.storage import open_source
from mergekit_ray.storage.faults import ShortBodyError
from mergekit_ray.storage.hub.branch import _without_address
from mergekit_ray.storage.hub.cache import HubCache, cached_snapshot
from mergekit_ray.storage.hub.faults import BackingStoreError, Subject, explain, is_transient, with_retries
from mergekit_ray.storage.hub.repository import _receive
from mergekit_ray.storage.hub.requests import Gate, asked_seconds, gate_of, is_hub
from mergekit_ray.storage.opening import open_sink
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.transfers import RetryPolicy

httpx: Any = sys.modules[errors.HfHubHTTPError.__bases__[0].__module__]
"""httpx or httpx2, whichever huggingface_hub stands on."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUBJECT = Subject("org/name", "main", "https://hub/org/name", "a.safetensors")
SIGNED = "https://store/blob?Signature=sesame"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "hub"


# Gates


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_an_open_gate_lets_pass_at_once() -> None:
    clock = Clock()
    Gate(clock, clock.sleep).enter()
    assert clock.slept == []


def test_a_pause_is_not_multiplied_by_those_who_are_told_of_it() -> None:
    clock = Clock()
    gate = Gate(clock, clock.sleep)
    assert [gate.close_for(10.0) for _ in range(16)] == [True] + [False] * 15
    gate.enter()
    gate.enter()
    [slept] = clock.slept
    assert 10.0 <= slept <= 11.0


def test_a_gate_that_is_closed_again_meanwhile_is_waited_for_again() -> None:
    clock = Clock()
    gate = Gate(clock, lambda seconds: (clock.sleep(seconds), len(clock.slept) == 1 and gate.close_for(5.0)))
    gate.close_for(10.0)
    gate.enter()
    assert len(clock.slept) == 2
    assert 15.0 <= sum(clock.slept) <= 16.5


def test_a_longer_pause_counts_and_an_endless_one_does_not() -> None:
    clock = Clock()
    gate = Gate(clock, clock.sleep)
    assert gate.close_for(10.0) is True
    assert gate.close_for(5.0) is False
    assert gate.close_for(1e9) is True
    gate.enter()
    assert 900.0 <= sum(clock.slept) <= 990.0


def test_each_host_has_its_own_gate() -> None:
    assert gate_of("https://hub/a?b") is gate_of("https://hub/c")
    assert gate_of("https://hub/a") is not gate_of("https://store/a")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 0 "}, 0.0),
        ({"Retry-After": "7", "RateLimit": '"api";r=0;t=55'}, 7.0),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        ({"RateLimit": '"api";r=12;t=55'}, 5.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 5.0),
        ({}, 5.0),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(headers: dict[str, str], seconds: float) -> None:
    assert asked_seconds(httpx.Headers(headers)) == seconds


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/org/name", True),
        ("http://huggingface.co/org/name", False),
        ("https://huggingface.co:8443/org/name", False),
        ("https://huggingface.co.evil.example/org/name", False),
        ("https://huggingface.co@evil.example/org/name", False),
        ("https://cdn-lfs.huggingface.co/blob", False),
    ],
)
def test_tokens_are_for_the_hub_alone(monkeypatch: pytest.MonkeyPatch, url: str, expected: bool) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    assert is_hub(url) is expected


# Faults


def answered(status: int, url: str = SIGNED, said: str = "") -> errors.HfHubHTTPError:
    request = httpx.Request("GET", url, headers={"authorization": "Bearer sesame"})
    response = httpx.Response(status, request=request, headers={"X-Error-Message": said})
    return errors.HfHubHTTPError(f"failed for {url}", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(503), True),
        (answered(429), True),
        (answered(404), False),
        (answered(507), False),
        (BackingStoreError(403), True),
        (BackingStoreError(418), False),
        (BackingStoreError(502), True),
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("late"), True),
        (httpx.RemoteProtocolError("closed"), True),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
        (ShortBodyError("short"), True),
        (ConnectionResetError(), True),
        (PermissionError(), False),
        (errors.OfflineModeIsEnabled("offline"), False),
    ],
)
def test_what_is_worth_another_try(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (answered(503), "after 3 attempts: the Hub answered 503", "run again to resume"),
        (answered(429), "rate limit", "hf auth login"),
        (answered(410), "the Hub answered 410", "HF_ENDPOINT"),
        (answered(401), "the Hub asks who this is", "hf auth login"),
        (answered(403), "may not read", "settings/tokens"),
        (answered(403, said="Private repository storage limit reached"), "limit is reached", "run again to resume"),
        (answered(507), "there is no room for it", "free some space of this account, and run again to resume"),
        (BackingStoreError(502), "the store behind the Hub answered 502", "run again"),
        (httpx.ConnectError("to https://store/blob?Signature=sesame"), "ConnectError", "hf download org/name"),
        (httpx.ConnectError("CERTIFICATE_VERIFY_FAILED"), "no secure connection", "SSL_CERT_FILE"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set", "hf download"),
    ],
)
def test_what_the_user_is_told(error: Exception, what: str, remedy: str) -> None:
    told = explain(error, doing="reading", subject=SUBJECT, num_attempts=3)
    assert what in told.what
    assert remedy in (told.remedy or "")
    assert (told.where or "").startswith("hf://org/name")
    assert "sesame" not in str(told)


def test_an_output_that_cannot_be_reached_is_not_to_be_fetched() -> None:
    written = replace(SUBJECT, revision="work", is_written=True)
    told = explain(httpx.ConnectError("no route"), doing="looking it up", subject=written, num_attempts=3)
    assert told.where == "hf://org/name"
    assert "write to a folder" in (told.remedy or "")
    assert "hf download" not in (told.remedy or "")


def test_an_output_needs_an_owner() -> None:
    with pytest.raises(ConfigError, match="needs its owner\n  write to hf://USER/merged"):
        open_sink("hf://merged")


def test_an_error_of_the_store_is_stripped_of_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
    stripped = _without_address(answered(403))
    assert isinstance(stripped, BackingStoreError)
    assert "sesame" not in str(stripped)
    for error in (answered(403, "https://hub/org/name"), httpx.ReadError("broken")):
        assert _without_address(error) is error


def test_other_exceptions_are_not_taken_for_faults_of_the_hub() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with_retries(RetryPolicy(), fail, doing="reading", subject=SUBJECT)


# What arrives


def chunked(data: bytes, sizes: list[int]) -> list[bytes]:
    chunks = []
    for size in sizes:
        chunks.append(data[:size])
        data = data[size:]
    return [*chunks, data]


@pytest.mark.parametrize("sizes", [[], [1, 1, 1], [0, 7, 0, 12], [50], [3, 17]])
@pytest.mark.parametrize("num_skipped", [0, 4])
def test_chunks_of_any_size_go_where_they_belong(sizes: list[int], num_skipped: int) -> None:
    data = bytes(range(num_skipped + 40))
    first, second = bytearray(5), bytearray(10)
    fetch = Fetch(100, 130, [(100, memoryview(first)), (120, memoryview(second))])
    _receive(iter(chunked(data, sizes)), fetch, num_skipped)
    assert first == data[num_skipped : num_skipped + 5]
    assert second == data[num_skipped + 20 : num_skipped + 30]
    assert fetch.position == 130


def test_what_arrived_of_a_short_answer_is_kept() -> None:
    buffer = bytearray(10)
    fetch = Fetch(0, 10, [(0, memoryview(buffer))])
    with pytest.raises(ShortBodyError):
        _receive(iter([b"abc", b"def"]), fetch, 0)
    assert fetch.position == 6
    _receive(iter([b"ghij"]), fetch, 0)
    assert buffer == b"abcdefghij"


# The cache


def snapshot(cache: Path, name: str = "org/name") -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "pr").mkdir(parents=True)
    (repository / "refs" / "main").write_text(f"{COMMIT}\n")
    (repository / "refs" / "pr" / "1").write_text(COMMIT)
    return folder


@pytest.mark.parametrize("revision", [None, "main", "pr/1", COMMIT])
def test_a_revision_in_the_cache(cache: Path, revision: str | None) -> None:
    folder = snapshot(cache)
    assert cached_snapshot("org/name", revision) == folder


@pytest.mark.parametrize("revision", ["", "v2", "..", "../main", "/etc", COMMIT[:7], "pr", "\0"])
def test_a_revision_that_is_not_in_the_cache(cache: Path, revision: str) -> None:
    snapshot(cache)
    assert cached_snapshot("org/name", revision or "dev") is None
    assert cached_snapshot("org/other", None) is None


def test_versions_are_names_of_blobs_and_without_links_of_commits(cache: Path) -> None:
    folder = snapshot(cache)
    (folder / "../../blobs/b10b").write_bytes(b"12345")
    (folder / "linked").symlink_to("../../blobs/b10b")
    (folder / "copied").write_bytes(b"123")
    source = open_source("org/name")
    assert isinstance(source, HubCache)
    assert [file.version for file in source.list()] == [f"{COMMIT}-3", "b10b-5"]
    assert source.holds_large_files(5)
    assert not source.holds_large_files(6)


# Opening


@pytest.mark.parametrize("reference", ["hf://", "hf://a/b/c", "hf://org/name--x", "hf://org/.name", "hf://org/na me"])
def test_names_that_the_hub_could_not_have(reference: str) -> None:
    with pytest.raises(ModelError, match="a valid name on the Hugging Face Hub") as caught:
        open_source(reference)
    assert caught.value.remedy == "names look like org/name"


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Llama").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("mergekit_ray.storage.hub.source.LOOK_UP", RetryPolicy(max_attempts=2, base_seconds=0.001))
    with pytest.raises(StorageError, match="looking it up failed after 2 attempts: ConnectError") as caught:
        open_source("Lama", "main")
    assert caught.value.retryable
    assert caught.value.where == "hf://Lama@main"
    assert "HF_HUB_OFFLINE=1; or did you mean Llama?" in str(caught.value)
