"""What stores offer to whoever replaces a model: conditional writes, moves, the end of what killed processes left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import ConditionalSink, MovingSink, RemainsSink, Sink
from mergekit_ray.storage.s3 import copy as s3_copy
from mergekit_ray.storage.s3.store import S3Store
from mergekit_ray.storage.transfers import RetryPolicy
from support.servers.faulty_s3 import FaultyS3, lose_answer, status
from support.servers.hostile_proxy import TRANSIENT, HostileProxy, Schedule
from support.servers.s3_server import S3Server

QUICK = RetryPolicy(max_attempts=3, base_seconds=0.001)


def opened(prefix: str, **more: Any) -> S3Store:
    bucket, _, folder = prefix.removeprefix("s3://").partition("/")
    return S3Store(bucket, folder, **more)


class Replacing:
    """Subclasses provide ``store``, an empty one."""

    @pytest.fixture
    def store(self) -> Sink:
        raise NotImplementedError

    def test_only_what_is_as_it_was_seen_is_replaced(self, store: Any) -> None:
        assert isinstance(store, ConditionalSink)
        assert store.replace("notes/a", b"0", version="none") is None
        assert store.list() == []
        first = store.put("notes/a", b"first")
        second = store.replace("notes/a", b"the second", version=first.version)
        assert second is not None
        assert second == store.stat("notes/a")
        assert store.replace("notes/a", b"the third one", version=first.version) is None
        assert store.read("notes/a", max_bytes=100) == b"the second"
        store.delete(["notes/a"])
        assert store.replace("notes/a", b"4", version=second.version) is None
        assert store.list() == []

    def test_of_many_who_replace_one_succeeds(self, store: Any) -> None:
        version = store.put("a", b"old").version
        with ThreadPoolExecutor(8) as executor:
            replies = list(executor.map(lambda i: store.replace("a", b"new %d" % i, version=version), range(8)))
        [winner] = [number for number, reply in enumerate(replies) if reply is not None]
        assert store.read("a", max_bytes=100) == b"new %d" % winner
        assert [file.name for file in store.list()] == ["a"]

    def test_files_are_moved_over_others(self, store: Any) -> None:
        assert isinstance(store, MovingSink)
        for name in ("deep/in/a", "deep/b", "a", "empty"):
            store.put(name, b"" if name == "empty" else f"content of {name}".encode())
        store.move({"deep/in/a": "a", "deep/b": "other/b", "empty": "e"})
        found = {file.name: store.read(file.name, max_bytes=100) for file in store.list()}
        assert found == {"a": b"content of deep/in/a", "other/b": b"content of deep/b", "e": b""}

    def test_a_file_that_is_not_there_is_not_moved(self, store: Any) -> None:
        store.put("a", b"a")
        with pytest.raises(CheckpointError, match="no such file"):
            store.move({"b": "a"})
        assert store.read("a", max_bytes=1) == b"a"

    def test_nothing_leaves_the_store(self, store: Any) -> None:
        store.put("a", b"a")
        for old, new in (("a", "../b"), ("../a", "b"), ("a", "/b")):
            with pytest.raises(CheckpointError, match="not the name of a file inside it"):
                store.move({old: new})
        with pytest.raises(CheckpointError, match="not the name of a file inside it"):
            store.replace("../a", b"", version="1")


class TestLocal(Replacing):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "out")

    def test_no_empty_folder_is_left(self, store: Any) -> None:
        store.put("deep/in/a", b"a")
        store.move({"deep/in/a": "a"})
        assert [path.name for path in Path(store.uri).rglob("*")] == ["a"]


def place(store: S3Store) -> tuple[str, str]:
    """The bucket, and what the keys of the store's files begin with."""
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/"


@pytest.mark.s3
class TestS3(Replacing):
    @pytest.fixture
    def store(self, s3_prefix: str) -> Iterator[S3Store]:
        store = opened(s3_prefix)
        yield store
        store.close()

    @pytest.fixture
    def client(self, s3_server: S3Server) -> Any:
        return s3_server.client()

    def unfinished(self, store: S3Store, client: Any) -> list[str]:
        bucket, prefix = place(store)
        found = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return sorted(each["Key"].removeprefix(prefix) for each in found if each["Key"].startswith(prefix))

    def test_large_objects_are_moved_in_parts(
        self, store: S3Store, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_copy, "PART_BYTES", 5 << 20)
        data = {name: random.Random(name).randbytes((11 << 20) + i) for i, name in enumerate("ab")}
        for name, content in data.items():
            store.put(f"staged/{name}", content)
        store.put("a", b"old")
        store.move({f"staged/{name}": name for name in data})
        assert {file.name: file.num_bytes for file in store.list()} == {n: len(c) for n, c in data.items()}
        for name, content in data.items():
            assert store.read(name, max_bytes=1 << 24) == content
        assert self.unfinished(store, client) == []

    @pytest.mark.parametrize("fault", TRANSIENT)
    def test_moves_outlive_what_another_try_mends(
        self, store: S3Store, s3_prefix: str, s3_server: S3Server, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_copy, "PART_BYTES", 5 << 20)
        data = {name: random.Random(name).randbytes(size) for name, size in (("a", 11 << 20), ("b", 1_000), ("c", 0))}
        for name, content in data.items():
            store.put(f"staged/{name}", content)
        with HostileProxy(s3_server.endpoint_url, Schedule(1, {fault: 0.5})) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            patient = RetryPolicy(max_attempts=8, base_seconds=0.001, max_seconds=0.01)
            disturbed = opened(s3_prefix, retry=patient)
            disturbed.move({f"staged/{name}": name for name in data})
            disturbed.close()
            assert proxy.counts[fault] > 0
        assert {name: store.read(name, max_bytes=1 << 24) for name in data} == data
        # Only an upload of which nobody heard that it had begun is left for `discard_remains`.
        assert store.discard_remains(list(data)) == 0 or fault in ("lost answer", "short body")

    @pytest.mark.parametrize("part_bytes", [5 << 20, 1 << 30])
    def test_an_object_that_changes_meanwhile_is_not_moved(
        self, store: S3Store, client: Any, part_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_copy, "PART_BYTES", part_bytes)
        store.put("staged/a", bytes(6 << 20))
        seen = store.stat("staged/a")
        store.put("staged/a", bytes((6 << 20) - 1))
        monkeypatch.setattr(store, "stat", lambda name: seen)
        with pytest.raises(CheckpointError, match="changed while it was being copied"):
            store.move({"staged/a": "a"})
        assert [file.name for file in store.list()] == ["staged/a"]
        assert self.unfinished(store, client) == []

    def test_remains_of_certain_files_are_discarded(self, store: S3Store, client: Any) -> None:
        assert isinstance(store, RemainsSink)
        for name in ("a", "a", "b", "deeper/a", "staged/x"):
            bucket, prefix = place(store)
            client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}{name}")
        assert store.discard_remains([]) == 0
        assert store.discard_remains(["a", "c"]) == 2
        assert self.unfinished(store, client) == ["b", "deeper/a", "staged/x"]
        assert store.discard_remains(["staged/x", "deeper/a", "b"]) == 3
        assert self.unfinished(store, client) == []

    def test_remains_of_another_models_folder_and_the_lease_stay(self, store: S3Store, client: Any) -> None:
        bucket, prefix = place(store)
        for name in ("a", "other-model/a", ".mergekit-ray/x/y.json", ".mergekit-ray/lease.json"):
            client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}{name}")
        assert store.discard_remains() == 2
        assert self.unfinished(store, client) == [".mergekit-ray/lease.json", "other-model/a"]
        assert store.discard_remains([".mergekit-ray/lease.json", "other-model/a"]) == 2


class TestFaults:
    """Answers that are lost or refused."""

    def test_a_conditional_write_whose_answer_was_lost_has_succeeded(self) -> None:
        with FaultyS3() as server:
            store = S3Store("bucket", "out", client=server.client, retry=QUICK)
            version = store.put("a", b"old").version
            server.faults.extend([lose_answer, status(412, "PreconditionFailed")])
            found = store.replace("a", b"new", version=version)
            assert found is not None
            assert found.num_bytes == 3

    def test_a_lost_race_after_a_lost_answer_is_lost(self) -> None:
        with FaultyS3() as server:
            store = S3Store("bucket", "out", client=server.client, retry=QUICK)
            version = store.put("a", b"old").version
            server.faults.extend([status(503, "SlowDown"), status(412, "PreconditionFailed")])
            assert store.replace("a", b"new", version=version) is None

    def test_where_uploads_may_not_be_listed_they_are_left(self) -> None:
        with FaultyS3(status(403, "AccessDenied")) as server:
            assert S3Store("bucket", "out", client=server.client, retry=QUICK).discard_remains(["a"]) is None

    def test_a_server_that_fails_is_told(self) -> None:
        with FaultyS3(*[status(503, "SlowDown")] * 3) as server:
            store = S3Store("bucket", "out", client=server.client, retry=QUICK)
            with pytest.raises(StorageError, match="listing unfinished uploads failed after 3 attempts"):
                store.discard_remains(["a"])
