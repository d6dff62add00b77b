"""What fails on the way to the Hub and back, and what is done without it."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from mergekit_ray.core.errors import CheckpointError, MergekitRayError, ModelError, StorageError
from mergekit_ray.storage import open_source
from mergekit_ray.storage.hub import source as hub
from mergekit_ray.storage.hub.cache import HubCache
from mergekit_ray.storage.hub.source import HubSource, MappedHubSource
from mergekit_ray.storage.transfers import RetryPolicy
from support.servers.hub_http import Fault, break_after, pass_by, refuse, reset, whole_files
from support.servers.hub_server import HubServer, content_id, serving
from support.store_conformance import fetch

QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)
DATA = random.Random(3).randbytes(200_000)
LARGE = random.Random(4).randbytes(3 << 20)
CONFIG = b'{"a": 1}'
BUSY = refuse(503)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, which this process's huggingface_hub takes for the only one, with a public repository."""
    monkeypatch.setattr(hub, "RetryPolicy", lambda: QUICK)
    monkeypatch.setattr(hub, "LOOK_UP", QUICK)
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:
        server.add("org/name", {"config.json": CONFIG, "model.safetensors": DATA})
        yield server


def opened(reference: str = "org/name") -> HubSource:
    source = open_source(reference)
    assert isinstance(source, HubSource)
    return source


def pinned(server: HubServer, name: str = "org/name") -> str:
    """The repository at its commit, which a worker opens."""
    return f"hf://{name}@{server.repos[name].branches['main']}"


@pytest.mark.parametrize("fault", [BUSY, refuse(500), refuse(408), refuse(504), reset, break_after(0), break_after(10)])
def test_a_transient_fault_of_the_store_is_outlived(server: HubServer, fault: Fault) -> None:
    source = opened()
    server.store_faults.extend([fault] * 2)
    assert fetch(source, "model.safetensors", [(100, 5_000)]) == [DATA[100:5_000]]
    assert len(server.paths("store")) == 3
    assert len(server.paths("hub")) == 2


@pytest.mark.parametrize("fault", [BUSY, refuse(500), reset])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_transient_fault_of_the_hub_is_outlived(server: HubServer, fault: Fault, at: int) -> None:
    """Request 0 is for the list, 1 and 2 for the files."""
    server.faults.extend([pass_by] * at + [fault] * 2)
    source = opened()
    assert fetch(source, "model.safetensors", [(100, 5_000)]) == [DATA[100:5_000]]
    assert source.read("config.json", max_bytes=10) == CONFIG


def test_a_broken_answer_is_continued_where_it_broke(server: HubServer) -> None:
    source = opened()
    server.store_faults.extend([break_after(3_000), break_after(1_000)])
    assert fetch(source, "model.safetensors", [(0, 2_000), (2_500, 10_000)]) == [DATA[:2_000], DATA[2_500:10_000]]
    spans = [request.span for request in server.requests if request.host == "store"]
    assert spans == ["0-9999", "3000-9999", "4000-9999"]


def test_only_the_failed_part_is_fetched_again(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_ray.storage.transfers.PART_BYTES", 20_000)
    source = opened()
    server.store_faults.append(BUSY)
    assert fetch(source, "model.safetensors", [(0, len(DATA))]) == [DATA]
    spans = [request.span for request in server.requests if request.host == "store"]
    assert (len(spans), len(set(spans))) == (11, 10)
    assert len(server.paths("hub")) == 2


def test_an_expired_address_is_asked_for_anew_once(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_ray.storage.transfers.PART_BYTES", 20_000)
    source = opened()
    for times in (1, 2):
        assert fetch(source, "model.safetensors", [(0, len(DATA))]) == [DATA]
        assert sum(request.method == "HEAD" for request in server.requests) == times
        server.expire()


def test_a_store_that_goes_on_refusing_becomes_an_error(server: HubServer) -> None:
    source = opened()
    server.store_faults.extend([refuse(403)] * 10)
    with pytest.raises(StorageError, match="failed after 4 attempts: the store behind the Hub answered 403") as caught:
        fetch(source, "model.safetensors", [(0, 10)])
    assert caught.value.where == f"{source.uri}/model.safetensors"
    assert "Signature" not in "".join(map(str, (caught.value, caught.value.__cause__)))


@pytest.mark.parametrize(("fault", "what"), [(BUSY, "the Hub answered 503"), (reset, "RemoteProtocolError")])
def test_a_fault_that_lasts_becomes_an_error(server: HubServer, fault: Fault, what: str) -> None:
    server.faults.extend([fault] * 10)
    with pytest.raises(StorageError, match=f"looking it up failed after 4 attempts: {what}") as caught:
        opened()
    assert caught.value.retryable
    assert "run again" in str(caught.value)
    assert len(server.requests) == 4


def test_a_permanent_fault_is_not_tried_again(server: HubServer) -> None:
    server.faults.append(refuse(418))
    with pytest.raises(StorageError, match="the Hub answered 418") as caught:
        opened()
    assert not caught.value.retryable
    assert len(server.requests) == 1


def test_a_server_that_sends_whole_files_is_put_up_with(server: HubServer) -> None:
    source = opened()
    server.store_faults.extend([break_after(3_000), whole_files])
    assert fetch(source, "model.safetensors", [(1_000, 9_000)]) == [DATA[1_000:9_000]]
    server.faults.append(whole_files)
    assert source.read_head("config.json", 3)[0] == CONFIG[:3]


def test_a_server_that_sends_whole_large_files_is_refused(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_ray.storage.hub.repository.MAX_SKIPPED_BYTES", 1_000)
    server.store_faults.extend([whole_files] * 10)
    with pytest.raises(StorageError, match="does not answer range requests"):
        fetch(opened(), "model.safetensors", [(1_001, 2_000)])
    assert len(server.paths("store")) == 1


def test_other_content_behind_an_address_is_noticed(server: HubServer) -> None:
    source = opened()
    fetch(source, "model.safetensors", [(0, 1)])
    server.blobs[content_id("model.safetensors", DATA)] = DATA + b"more"
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        fetch(source, "model.safetensors", [(0, 1)])
    server.blobs[content_id("model.safetensors", DATA)] = DATA[:10]
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        fetch(source, "model.safetensors", [(100, 200)])


def test_after_an_error_nothing_more_is_written_to_the_buffers(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ray.storage.transfers.PART_BYTES", 2_000)
    source = opened()
    server.store_faults.append(refuse(418))
    buffer = bytearray(len(DATA))
    with pytest.raises(StorageError):
        source.read_ranges("model.safetensors", [(0, len(DATA))], [memoryview(buffer)])
    after = bytes(buffer)
    threading.Event().wait(0.1)
    assert bytes(buffer) == after


def test_a_session_that_is_closed_meanwhile_is_opened_again(server: HubServer) -> None:
    source = opened()

    def close(handler: Any) -> bool:
        huggingface_hub.close_session()
        return pass_by(handler)

    server.store_faults.append(close)
    assert fetch(source, "model.safetensors", [(0, len(DATA))]) == [DATA]


def test_connections_are_used_again(server: HubServer) -> None:
    source = opened()
    ports = set()

    def note(handler: Any) -> bool:
        ports.add(handler.client_address[1])
        return True

    server.store_faults.extend([note] * 5)
    for _ in range(5):
        fetch(source, "model.safetensors", [(0, 1_000)])
    assert len(ports) == 1


@pytest.mark.parametrize("headers", [{"Retry_After": "1"}, {"RateLimit": '"resolvers";r=0;t=1'}])
def test_all_threads_wait_once_for_a_rate_limit(
    server: HubServer, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    sources = [opened(pinned(server)) for _ in range(8)]
    server.faults.extend([refuse(429, **headers)] * 4)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda source: fetch(source, "model.safetensors", [(0, 10)]), sources))
    assert found == [[DATA[:10]]] * 8
    assert len(server.paths("hub")) == 8 + 4
    # Refusals that come together are one pause.
    assert len([record for record in caplog.records if "rate limit" in record.message]) in (1, 2)
    assert all(record.levelno == logging.WARNING for record in caplog.records if "rate limit" in record.message)


def test_a_rate_limit_that_lasts_advises_to_log_in(server: HubServer) -> None:
    server.faults.extend([refuse(429, Retry_After="0")] * 10)
    with pytest.raises(StorageError, match="the Hub's rate limit is reached") as caught:
        opened()
    assert "hf auth login" in str(caught.value)
    assert caught.value.retryable


# The cache


def download(*names: str) -> None:
    for name in names:
        huggingface_hub.hf_hub_download("org/name", name)


def test_what_is_in_the_cache_is_not_asked_for(server: HubServer) -> None:
    server.add("org/name", {"config.json": CONFIG, "model.safetensors": LARGE, "other.safetensors": DATA})
    before = opened().list()
    download("model.safetensors")
    source = open_source("org/name")
    assert isinstance(source, MappedHubSource)
    server.requests.clear()
    stat = source.stat("model.safetensors")
    assert stat in before
    assert stat in source.list()
    assert fetch(source, "model.safetensors", [(7, 2_000_000)], stat.version) == [LARGE[7:2_000_000]]
    assert source.read_head("model.safetensors", 8) == (LARGE[:8], stat)
    assert source.map_range("model.safetensors", 7, 1 << 20, version=stat.version).data == LARGE[7 : 1 << 20]
    assert server.requests == []
    assert fetch(source, "other.safetensors", [(0, 10)]) == [DATA[:10]]
    assert source.map_range("other.safetensors", 5, 1_000).data == DATA[5:1_000]
    assert source.stat("other.safetensors") in before
    with pytest.raises(CheckpointError, match="no such file"):
        source.map_range("nothing", 0, 1)


def test_a_cache_of_small_files_is_not_mapped(server: HubServer) -> None:
    download("config.json")
    source = opened(pinned(server))
    assert not isinstance(source, MappedHubSource)
    server.requests.clear()
    assert source.read("config.json", max_bytes=10) == CONFIG
    assert server.requests == []


def test_a_truncated_file_in_the_cache_is_not_used(server: HubServer, tmp_path: Path) -> None:
    download("model.safetensors")
    [blob] = (tmp_path / "home" / "hub").glob("models--org--name/blobs/*")
    blob.write_bytes(DATA[:100])
    source = opened()
    stat = source.stat("model.safetensors")
    assert stat is not None
    assert stat.num_bytes == len(DATA)
    assert fetch(opened(pinned(server)), "model.safetensors", [(0, 200)], stat.version) == [DATA[:200]]


def test_without_the_hub_the_cache_is_used(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    download("config.json", "model.safetensors")
    server.faults.extend([reset] * 20)
    source = open_source("org/name")
    assert isinstance(source, HubCache)
    assert source.uri == pinned(server)
    assert "the Hub cannot be reached" in caplog.text
    assert fetch(source, "model.safetensors", [(0, 9)]) == [DATA[:9]]
    assert [file.name for file in opened(pinned(server)).list()] == ["config.json", "model.safetensors"]


def test_offline_only_the_cache_is_used(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    download("config.json")
    source = opened(pinned(server))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert open_source("org/name").read("config.json", max_bytes=10) == CONFIG
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set") as caught:
        open_source("org/other")
    assert caught.value.remedy == "fetch it first: hf download org/other"
    with pytest.raises(MergekitRayError, match="HF_HUB_OFFLINE is set"):
        fetch(source, "model.safetensors", [(0, 1)])
    assert server.requests == []
