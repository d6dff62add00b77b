from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mergekit_ray.core.errors import StorageError
from mergekit_ray.storage import open_sink
from mergekit_ray.storage.protocols import Sink
from mergekit_ray.storage.s3 import upload as s3_upload_module
from mergekit_ray.storage.s3.store import S3Store
from support.servers.s3_server import SECRET_KEY, S3Server
from support.store_conformance import StoreConformance, fetch, store_bytes

pytestmark = pytest.mark.s3

BIG = random.Random(1).randbytes(40 << 20)


def open_s3(uri: str) -> S3Store:
    store = open_sink(uri)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def big_store(s3_prefix: str) -> Iterator[S3Store]:
    store = open_s3(s3_prefix)
    yield store
    store.close()


class TestS3Store(StoreConformance):
    @pytest.fixture
    def store(self, s3_prefix: str, s3_server: S3Server) -> Iterator[S3Store]:
        self._client = s3_server.client()
        store = open_s3(f"{s3_prefix}/with space/é")
        yield store
        store.close()

    def leftovers(self, store: Sink) -> list[str]:
        return unfinished(self._client, store)


def unfinished(client: Any, store: Sink) -> list[str]:
    """Keys of the multipart uploads below ``store`` that were neither completed nor aborted."""
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return [upload["Key"] for upload in uploads if upload["Key"].startswith(f"{prefix}/")]


def write_in_pieces(store: Sink, name: str, data: bytes, piece: int) -> Any:
    upload = store.open(name, len(data))
    buffer = bytearray(piece)
    for start in range(0, len(data), piece):
        chunk = data[start : start + piece]
        buffer[: len(chunk)] = chunk
        upload.write(memoryview(buffer)[: len(chunk)])
    return upload


@pytest.mark.parametrize("num_bytes", [(16 << 20) - 1, 16 << 20, (16 << 20) + 1, 40 << 20])
def test_uploads_around_the_part_size(big_store: S3Store, num_bytes: int) -> None:
    data = BIG[:num_bytes]
    stat = write_in_pieces(big_store, "big", data, 5_000_001).commit()
    assert stat == big_store.stat("big")
    assert stat.num_bytes == num_bytes
    # A multipart ETag ends in the number of parts.
    assert stat.version.partition("-")[2] == ("" if num_bytes <= 16 << 20 else str(-(-num_bytes // (16 << 20))))
    assert fetch(big_store, "big", [(0, num_bytes)], stat.version) == [data]
    assert fetch(big_store, "big", [(0, 10), (num_bytes - 10, num_bytes)], stat.version) == [data[:10], data[-10:]]


def test_many_parts_with_few_in_flight(big_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload_module, "MIN_PART_BYTES", 5 << 20)
    stat = write_in_pieces(big_store, "big", BIG, 1 << 20).commit()
    assert stat.version.endswith("-8")
    [data] = fetch(big_store, "big", [(0, len(BIG))], stat.version)
    assert hashlib.sha256(data).digest() == hashlib.sha256(BIG).digest()


def test_an_aborted_multipart_upload_leaves_nothing(big_store: S3Store, s3_server: S3Server) -> None:
    client = s3_server.client()
    upload = write_in_pieces(big_store, "big", BIG[: 33 << 20], 1 << 20)
    assert len(unfinished(client, big_store)) == 1
    upload.abort()
    assert unfinished(client, big_store) == []
    assert big_store.list() == []


def test_a_failed_commit_can_be_aborted(big_store: S3Store, s3_server: S3Server) -> None:
    upload = big_store.open("big", len(BIG))
    upload.write(BIG[: 20 << 20])
    with pytest.raises(StorageError, match="announced"):
        upload.commit()
    upload.abort()
    assert unfinished(s3_server.client(), big_store) == []


def test_more_files_than_a_page_lists(big_store: S3Store, s3_server: S3Server) -> None:
    bucket, _, prefix = big_store.uri.removeprefix("s3://").partition("/")
    client = s3_server.client()
    names = [f"{number:04}" for number in range(1050)]
    for name in names:
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"")
    assert [file.name for file in big_store.list()] == names
    big_store.delete(names)
    assert big_store.list() == []


def test_neighbouring_prefixes_are_apart(s3_prefix: str) -> None:
    open_s3(f"{s3_prefix}/model-2").put("a", b"2")
    store = open_s3(f"{s3_prefix}/model")
    assert store.list() == []
    store.put("a", b"1")
    assert [file.name for file in store.list()] == ["a"]


def test_the_root_of_a_bucket(s3_server: S3Server, s3_environment: S3Server) -> None:
    s3_server.create_bucket("whole-bucket")
    store = open_s3("s3://whole-bucket")
    stat = store.put("folder/a", b"1")
    assert store.list() == [stat]
    assert store.read("folder/a", max_bytes=1) == b"1"


ACTIONS: list[Callable[[Sink], object]] = [
    lambda store: store.list(),
    lambda store: store.read("a", max_bytes=1),
    lambda store: fetch(store, "a", [(0, 1)]),
    lambda store: store.put("a", b"1"),
    lambda store: store.put_if_absent("a", b"1"),
    lambda store: store_bytes(store, "a", BIG[: 17 << 20]),
    lambda store: store.delete(["a"]),
]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_wrong_secret(s3_prefix: str, monkeypatch: pytest.MonkeyPatch, action: Callable[[Sink], object]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as caught:
        action(open_s3(s3_prefix))
    assert "the secret key is wrong" in str(caught.value)
    assert "not-the-secret" not in str(caught.value)


def test_a_wrong_secret_is_not_an_absent_file(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match="the server answered 403"):
        open_s3(s3_prefix).stat("a")


def test_an_unknown_key(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match="InvalidAccessKeyId"):
        open_s3(s3_prefix).list()


def test_no_credentials(s3_prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no usable credentials") as caught:
        open_s3(s3_prefix).list()
    assert "AWS_PROFILE" in str(caught.value)


def test_a_profile_that_does_not_exist(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="ProfileNotFound"):
        open_s3(s3_prefix).list()


# Writing is not among them: SeaweedFS creates buckets for those who may.
@pytest.mark.parametrize("action", ACTIONS[:3])
def test_a_bucket_that_does_not_exist(s3_environment: S3Server, action: Callable[[Sink], object]) -> None:
    with pytest.raises(StorageError, match="NoSuchBucket") as caught:
        action(open_s3("s3://no-such-bucket/prefix"))
    assert "create the bucket" in str(caught.value)


def test_over_https(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(https=True) as server:
        server.create_bucket("secure")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for checksums in ("when_required", "when_supported"):
            monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
            store = open_s3(f"s3://secure/{checksums}")
            stat = write_in_pieces(store, "big", BIG, 3_000_001).commit()
            assert fetch(store, "big", [(0, len(BIG))], stat.version) == [BIG]
            assert store.put_if_absent("small", b"1") is True
            assert store.put_if_absent("small", b"2") is False
            store.delete(["small", "big"])
            assert store.list() == []
            store.close()
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StorageError, match="no secure connection") as caught:
            open_s3("s3://secure").list()
        assert "AWS_CA_BUNDLE" in str(caught.value)
        assert SECRET_KEY not in str(caught.value)
