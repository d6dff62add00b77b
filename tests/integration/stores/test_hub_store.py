"""Writing to repositories of the Hub through huggingface_hub, against a server that speaks its API."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mergekit_ray.core.errors import ConfigError, ModelError, StorageError
from mergekit_ray.storage import open_sink, open_source
from mergekit_ray.storage.fence import LEASE_FILE, Fence, guarded
from mergekit_ray.storage.hub import store as hub_store
from mergekit_ray.storage.hub.branch import BASE_FILE, BRANCH
from mergekit_ray.storage.hub.store import HubStore
from mergekit_ray.storage.protocols import PublishingSink, Sink
from mergekit_ray.storage.transfers import RetryPolicy
from support.servers.hub_http import Fault, refuse, reset
from support.servers.hub_server import TOKEN, point_at, serving
from support.servers.hub_writing import CHUNK_BYTES, WritableHubServer
from support.store_conformance import DATA, StoreConformance, store_bytes

QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)
RECORD = ".mergekit-ray/digest/record.json"


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHubServer]:
    monkeypatch.setattr(hub_store, "RetryPolicy", lambda: QUICK)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(WritableHubServer(), monkeypatch, tmp_path / "home", token=TOKEN) as server:
        yield server


def opened() -> HubStore:
    store = open_sink("hf://org/out")
    assert isinstance(store, HubStore)
    return store


def spooled(tmp_path: Path) -> list[Path]:
    """Temporary files of uploads."""
    return list(tmp_path.glob("mergekit-ray-*"))


def uploaded(server: WritableHubServer) -> int:
    """Requests by which content was sent to the store."""
    return sum(request.method == "PUT" for request in server.requests)


def published_times(server: WritableHubServer) -> int:
    """Commits to ``main``."""
    return sum(branch == "main" for branch, _ in server.messages)


class TestHubStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path, server: WritableHubServer) -> HubStore:
        self._folder, self._server = tmp_path, server
        server.first_files = {}
        return opened()

    def leftovers(self, store: Sink) -> list[str]:
        return [str(path) for path in spooled(self._folder)] + list(self._server.uploads)


def test_opening_asks_nothing(server: WritableHubServer) -> None:
    store = opened()
    assert isinstance(store, PublishingSink)
    assert store.uri == "hf://org/out"
    assert server.requests == []


def test_nothing_is_on_main_before_the_end_and_all_of_it_then(server: WritableHubServer) -> None:
    store = opened()
    store.put(RECORD, b"{}")
    shard = store_bytes(store, "model.safetensors", DATA)
    store.put("config.json", b"{}")
    store.put("README.md", b"---\ntags: [merge]\n---\n")
    repo = server.repos["org/out"]
    assert server.private == {"org/out"}
    assert list(repo.head()) == [".gitattributes"]
    assert set(repo.head(BRANCH)) == {".gitattributes", BASE_FILE, RECORD, "model.safetensors"}
    listed = [".gitattributes", RECORD, "README.md", "config.json", "model.safetensors"]
    assert [file.name for file in store.list()] == listed
    sent = uploaded(server)
    assert sent == -(-len(DATA) // CHUNK_BYTES)
    store.finish()
    assert set(repo.head()) == {".gitattributes", "model.safetensors", "config.json", "README.md"}
    assert repo.head()["model.safetensors"] == DATA
    assert list(repo.branches) == ["main"]
    assert published_times(server) == 1
    assert uploaded(server) == sent
    assert opened().stat("model.safetensors") == shard
    assert open_source("org/out").stat("model.safetensors") == shard


def test_another_process_finds_what_was_committed(server: WritableHubServer) -> None:
    first, second = opened(), opened()
    first.put(RECORD, b"{}")
    stat = store_bytes(second, "a.safetensors", DATA)
    first.put("config.json", b"{}")
    third = opened()
    assert third.stat("a.safetensors") == stat
    assert third.read(RECORD, max_bytes=10) == b"{}"
    assert third.stat("config.json") is None
    third.put("config.json", b"other")
    third.finish()
    assert server.repos["org/out"].head()["config.json"] == b"other"
    assert sum(message == "Begin a merge" for _, message in server.messages) == 1


def test_an_old_model_is_replaced_by_one_commit(server: WritableHubServer) -> None:
    server.add("org/out", {"old.safetensors": b"old", "config.json": b"old", "README.md": b"old", "same.bin": b"same"})
    store = opened()
    store.delete(["old.safetensors", "README.md", "nothing"])
    store_bytes(store, "new.safetensors", b"new")
    store.put("config.json", b"new")
    repo = server.repos["org/out"]
    assert set(repo.head()) == {"old.safetensors", "config.json", "README.md", "same.bin"}
    repo.commit({**repo.head(), "by-another": b"1"})
    store.finish()
    expected = {"new.safetensors": b"new", "config.json": b"new", "same.bin": b"same", "by-another": b"1"}
    assert repo.head() == expected
    assert server.private == set()


def test_a_commit_by_another_in_between_is_not_undone(server: WritableHubServer) -> None:
    """It also removes what is to be removed."""
    server.add("org/out", {"old.safetensors": b"old"})
    store = opened()
    store.delete(["old.safetensors"])
    store_bytes(store, "a.safetensors", DATA)
    repo = server.repos["org/out"]

    def interfere(handler: Any) -> bool:
        if "/commit/main" in handler.path and "by-another" not in repo.head():
            repo.commit({"by-another": b"1"})
        return True

    server.faults.extend([interfere] * 20)
    store.finish()
    assert set(repo.head()) == {"a.safetensors", "by-another"}
    assert published_times(server) == 1


class TestFence:
    """Two merges into one repository, of which one has lost its lease."""

    @pytest.fixture
    def drivers(self, server: WritableHubServer) -> tuple[HubStore, HubStore]:
        """The first has written all, and has lost the lease to the second."""
        server.add("org/out", {"config.json": b"old", "old.safetensors": b"old"})
        first, second = opened(), opened()
        first.put(LEASE_FILE, b'{"token": "first"}')
        stat = first.stat(LEASE_FILE)
        assert stat is not None
        late = guarded(first, Fence("hf://org/out", "first"))
        assert isinstance(late, HubStore)
        store_bytes(late, "model-1-of-2.safetensors", DATA)
        late.put("config.json", b"first")
        assert second.replace(LEASE_FILE, b'{"token": "second"}', version=stat.version) is not None
        current = guarded(second, Fence("hf://org/out", "second"))
        assert isinstance(current, HubStore)
        current.delete(["model-1-of-2.safetensors", "old.safetensors"])
        store_bytes(current, "model.safetensors", b"second")
        current.put("config.json", b"second")
        return late, current

    def test_only_one_replaces_the_lease(self, drivers: tuple[HubStore, HubStore]) -> None:
        late, _ = drivers
        stat = late.stat(LEASE_FILE)
        assert stat is not None
        assert late.replace(LEASE_FILE, b"late", version="another") is None
        assert late.replace("nothing", b"late", version=stat.version) is None

    def test_the_late_one_writes_and_publishes_nothing(
        self, server: WritableHubServer, drivers: tuple[HubStore, HubStore]
    ) -> None:
        late, current = drivers
        before = server.repos["org/out"].head(BRANCH)
        changes: tuple[Callable[[], object], ...] = (
            lambda: store_bytes(late, "x.safetensors", DATA),
            lambda: late.put(RECORD, b"{}"),
            lambda: late.delete(["model.safetensors"]),
            late.finish,
        )
        for change in changes:
            with pytest.raises(StorageError, match="no longer holds its output"):
                change()
        assert server.repos["org/out"].head(BRANCH) == before
        current.finish()
        expected = {"model.safetensors": b"second", "config.json": b"second"}
        assert server.repos["org/out"].head() == expected
        with pytest.raises(StorageError, match="no longer holds its output"):
            late.finish()
        assert server.repos["org/out"].head() == expected

    def test_a_model_published_late_is_replaced_as_a_whole(
        self, server: WritableHubServer, drivers: tuple[HubStore, HubStore]
    ) -> None:
        _, current = drivers
        repo = server.repos["org/out"]
        repo.commit({"config.json": b"first", "model-1-of-2.safetensors": DATA})
        current.finish()
        assert repo.head() == {"model.safetensors": b"second", "config.json": b"second"}


def test_finishing_nothing_does_nothing(server: WritableHubServer) -> None:
    opened().finish()
    assert "org/out" not in server.repos
    server.add("org/out", {"a": b"1"})
    opened().finish()
    assert server.messages == []


def lose_answer(handler: Any) -> bool:
    """Do what is asked, then close the connection without an answer."""
    handler.body()
    answer = handler.wfile
    handler.wfile = type("Nowhere", (), {"write": lambda self, data: len(data), "flush": lambda self: None})()
    try:
        handler.route(handler.path.partition("?")[0])
    finally:
        handler.wfile = answer
        handler.close_connection = True
    return False


PATHS = ["/commit/", "/branch/", "/api/repos/create", "/api/models/org/out", "/paths-info/"]


@pytest.mark.parametrize(
    ("fault", "path"),
    [
        *itertools.product([refuse(503), reset, lose_answer], PATHS),
        *itertools.product([refuse(409), refuse(412)], ["/commit/"]),
    ],
)
def test_a_fault_anywhere_is_outlived(server: WritableHubServer, fault: Fault, path: str) -> None:
    failed = set()

    def once_for_each(handler: Any) -> bool:
        where = (handler.command, handler.path.partition("?")[0])
        if path in handler.path and where not in failed:
            failed.add(where)
            return fault(handler)
        return True

    server.faults.extend([once_for_each] * 200)
    store = opened()
    store.put(RECORD, b"{}")
    store_bytes(store, "a.safetensors", DATA)
    store.put("config.json", b"{}")
    store.finish()
    assert failed
    repo = server.repos["org/out"]
    assert repo.head() == {".gitattributes": repo.head()[".gitattributes"], "a.safetensors": DATA, "config.json": b"{}"}
    assert list(repo.branches) == ["main"]


def test_an_address_for_an_upload_that_is_refused_is_asked_for_anew(server: WritableHubServer, tmp_path: Path) -> None:
    server.store_faults.append(refuse(403))
    store_bytes(opened(), "a.safetensors", DATA)
    assert server.repos["org/out"].head(BRANCH)["a.safetensors"] == DATA
    assert spooled(tmp_path) == []


def test_an_upload_that_fails_leaves_nothing_and_quotes_no_address(server: WritableHubServer, tmp_path: Path) -> None:
    upload = opened().open("a.safetensors", len(DATA))
    upload.write(DATA)
    server.store_faults.extend([refuse(403)] * 10)
    with pytest.raises(StorageError, match="the store behind the Hub answered 403") as caught:
        upload.commit()
    told = "".join(traceback.format_exception(caught.value))
    assert "Signature" not in told
    assert TOKEN not in told
    assert len(spooled(tmp_path)) == 1
    upload.abort()
    upload.abort()
    assert spooled(tmp_path) == []
    assert set(server.repos["org/out"].head(BRANCH)) == {".gitattributes", BASE_FILE}


def test_a_place_for_temporary_files_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="No such file") as caught:
        opened().open("a.safetensors", 1)
    assert caught.value.where == str(tmp_path / "nowhere")


def test_content_that_the_hub_has_is_not_sent_again(server: WritableHubServer) -> None:
    server.add("org/other", {"x.safetensors": DATA})
    server.sign(DATA)
    store_bytes(opened(), "a.safetensors", DATA)
    assert uploaded(server) == 0
    assert server.repos["org/out"].head(BRANCH)["a.safetensors"] == DATA


@pytest.mark.parametrize(
    ("token", "exists", "what"),
    [
        (None, False, "the Hub asks who this is"),
        (None, True, "may not write to the repository"),
        ("hf_reader", False, "may not write to the repository"),
        ("hf_reader", True, "may not write to the repository"),
        ("hf_mistyped", False, "does not accept the token"),
    ],
)
def test_who_may_not_write(
    server: WritableHubServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str | None,
    exists: bool,
    what: str,
) -> None:
    point_at(monkeypatch, server, tmp_path / "home", token=token)
    server.tokens.add("hf_reader")
    if exists:
        server.add("org/out", {})
    with pytest.raises(ModelError, match=what) as caught:
        opened().put(RECORD, b"{}")
    assert caught.value.where == "hf://org/out"
    assert token is None or token not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "what"),
    [("hf://org/out@main", "on the main branch"), ("hf://a/b/c", "nor a valid name on the Hugging Face Hub")],
)
def test_places_that_are_not_written_to(uri: str, what: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=what):
        open_sink(uri)


def test_offline_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        opened()
