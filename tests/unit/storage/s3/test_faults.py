from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.s3 import faults as s3_faults
from mergekit_ray.storage.s3 import upload as s3_upload_module
from mergekit_ray.storage.s3.store import S3Store
from mergekit_ray.storage.s3.upload import part_bytes_for
from mergekit_ray.storage.transfers import RetryPolicy
from support.servers.faulty_s3 import FaultyS3, break_after, lose_answer, reset, stall, status
from support.store_conformance import fetch, store_bytes

DATA = random.Random(2).randbytes(100_000)
QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)
SLOW_DOWN = status(503, "SlowDown")


@pytest.fixture
def server() -> Iterator[FaultyS3]:
    with FaultyS3() as server:
        server.objects["prefix/a"] = DATA
        yield server


@pytest.fixture
def store(server: FaultyS3) -> Iterator[S3Store]:
    store = S3Store("bucket", "prefix", client=server.client, retry=QUICK)
    yield store
    store.close()


@pytest.mark.parametrize(
    "fault",
    [
        SLOW_DOWN,
        status(500, "InternalError"),
        status(502, "BadGateway"),
        status(429, "TooManyRequests"),
        status(408, "RequestTimeout"),
        status(400, "RequestTimeout"),
        reset,
        stall(0.8),
        break_after(0),
        break_after(10),
    ],
)
def test_a_transient_fault_is_outlived(server: FaultyS3, store: S3Store, fault: object) -> None:
    server.faults.extend([fault] * 2)
    assert fetch(store, "a", [(100, 5_000)], "etag") == [DATA[100:5_000]]
    assert len(server.requests) == 3


def test_a_broken_answer_is_continued_where_it_broke(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([break_after(3_000), break_after(1_000)])
    assert fetch(store, "a", [(0, 2_000), (2_500, 10_000)], "etag") == [DATA[:2_000], DATA[2_500:10_000]]
    assert [span for _, span in server.requests] == ["bytes=0-9999", "bytes=3000-9999", "bytes=4000-9999"]


def test_only_the_failed_part_is_fetched_again(
    server: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ray.storage.transfers.PART_BYTES", 10_000)
    server.faults.extend([SLOW_DOWN])
    assert fetch(store, "a", [(0, len(DATA))], "etag") == [DATA]
    assert len(server.requests) == 11
    assert len({span for _, span in server.requests}) == 10


def test_a_fault_that_lasts_becomes_an_error(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([SLOW_DOWN] * 10)
    with pytest.raises(StorageError, match=r"failed after 4 attempts: the server answered 503 \(SlowDown\)") as caught:
        fetch(store, "a", [(0, 10)], "etag")
    assert caught.value.where == "s3://bucket/prefix/a"
    assert "run again to resume" in str(caught.value)
    assert len(server.requests) == 4


def test_a_lasting_reset_names_no_credential(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([reset] * 10)
    with pytest.raises(StorageError, match="listing failed after 4 attempts: ConnectionClosedError") as caught:
        store.list()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "name"),
    [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (404, "NoSuchBucket"), (400, "InvalidRequest")],
)
def test_a_permanent_fault_is_not_tried_again(server: FaultyS3, store: S3Store, code: int, name: str) -> None:
    server.faults.extend([status(code, name)] * 10)
    with pytest.raises(StorageError, match=name):
        fetch(store, "a", [(0, 10)], "etag")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (507, "XMinioStorageFull"),
        (507, "InsufficientStorage"),
        (503, "XMinioStorageFull"),
        (400, "XMinioAdminBucketQuotaExceeded"),
        (403, "QuotaExceeded"),
    ],
)
@pytest.mark.parametrize("at", [0, 3, 11])
@pytest.mark.usefixtures("small_parts")
def test_no_room_is_told_at_once(server: FaultyS3, store: S3Store, code: int, name: str, at: int) -> None:
    """Whether the upload begins, sends a part, or is completed."""
    server.faults.extend([lambda _: True] * at + [status(code, name)] * 40)
    with pytest.raises(StorageError, match=rf"there is no room: the server answered {code} \({name}\)") as caught:
        store_bytes(store, "b", DATA)
    assert not caught.value.retryable
    assert "have the bucket's quota raised, or choose another place, and run again to resume" in str(caught.value)
    assert "prefix/b" not in server.objects
    assert len(server.requests) == at + 1 if at != 3 else len(server.requests) <= 11, "other parts were under way"


def test_no_room_for_the_lease_or_a_note(server: FaultyS3, store: S3Store) -> None:
    for change in (
        lambda: store.put("b", b"1"),
        lambda: store.put_if_absent("lease", b"1"),
        lambda: store.replace("a", b"1", version="etag"),
        lambda: store.move({"a": "b"}),
    ):
        server.faults.clear()
        server.faults.extend([status(507, "XMinioStorageFull")] * 9)
        server.requests.clear()
        with pytest.raises(StorageError, match="there is no room"):
            change()
        assert len(server.requests) == 1


def test_a_server_that_ignores_the_condition_is_caught(store: S3Store) -> None:
    with pytest.raises(CheckpointError, match="changed"):
        fetch(store, "a", [(0, 10)], "another")


def test_a_server_that_ignores_the_range_is_caught(server: FaultyS3, store: S3Store) -> None:
    server.faults.append(status(200, "x", ETag='"etag"'))
    with pytest.raises(StorageError, match="does not answer range requests"):
        fetch(store, "a", [(10, 20)], "etag")


def test_head_and_stat_are_tried_again(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([reset, break_after(5), SLOW_DOWN])
    data, stat = store.read_head("a", 100)
    assert data == DATA[:100]
    assert stat.num_bytes == len(DATA)
    server.faults.append(reset)
    assert store.stat("a") == stat


def test_faults_of_many_requests_at_once_are_outlived(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([status(500, "InternalError")] * 3 * 24)
    policy = RetryPolicy(max_attempts=3 * 24 + 1, base_seconds=0.001, max_seconds=0.01)
    patient = S3Store("bucket", "prefix", client=server.client, retry=policy)
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda number: patient.put(f"{number}", b"1"), range(24)))
    assert len(server.objects) == 1 + 24


def test_after_an_error_nothing_more_is_written_to_the_buffers(
    server: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ray.storage.transfers.PART_BYTES", 1_000)
    server.faults.append(status(403, "AccessDenied"))
    buffer = bytearray(len(DATA))
    with pytest.raises(StorageError):
        store.read_ranges("a", [(0, len(DATA))], [memoryview(buffer)])
    after = bytes(buffer)
    threading.Event().wait(0.1)
    assert bytes(buffer) == after


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload_module, "MIN_PART_BYTES", 10_000)
    monkeypatch.setattr(s3_upload_module, "PART_GRAIN_BYTES", 1)


@pytest.mark.parametrize("fault", [SLOW_DOWN, reset, lose_answer])
@pytest.mark.parametrize("at", [0, 1, 5, 10, 11])
@pytest.mark.usefixtures("small_parts")
def test_an_upload_outlives_a_fault_anywhere(server: FaultyS3, store: S3Store, fault: object, at: int) -> None:
    """Request 0 begins the upload, 1 to 10 are its parts, 11 completes it."""
    server.faults.extend([lambda _: True] * at + [fault])
    stat = store_bytes(store, "b", DATA)
    assert server.objects["prefix/b"] == DATA
    assert (stat.num_bytes, stat.version) == (len(DATA), "etag")


@pytest.mark.usefixtures("small_parts")
def test_an_upload_that_fails_can_be_aborted(server: FaultyS3, store: S3Store) -> None:
    server.faults.extend([lambda _: True] * 3 + [status(403, "AccessDenied")])
    upload = store.open("b", len(DATA))
    with pytest.raises(StorageError, match="AccessDenied"):  # noqa: PT012 - the write or the commit may be first to know
        upload.write(DATA)
        upload.commit()
    upload.abort()
    assert server.uploads == {}
    assert "prefix/b" not in server.objects


@pytest.mark.usefixtures("small_parts")
def test_an_abort_that_fails_hides_nothing(server: FaultyS3, store: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    upload = store.open("b", len(DATA))
    upload.write(DATA[:20_001])
    server.faults.extend([status(403, "AccessDenied")] * 3)
    upload.abort()
    assert "stays behind" in caplog.text


def test_a_lost_answer_is_not_a_lost_race(server: FaultyS3, store: S3Store) -> None:
    server.faults.append(lose_answer)
    assert store.put_if_absent("lease", b"mine") is True
    assert store.put_if_absent("lease", b"another") is False
    server.faults.append(reset)
    assert store.put_if_absent("lease", b"another") is False


@pytest.mark.parametrize("num_bytes", [0, 1, 16 << 20, 10**9, 10**11, 5 * 2**40])
def test_parts_are_few_enough_for_s3(num_bytes: int) -> None:
    size = part_bytes_for(num_bytes)
    assert size % (1 << 20) == 0
    assert size >= 16 << 20
    assert -(-num_bytes // size) <= 9000
    assert size <= max(16 << 20, num_bytes // 9000 + (1 << 20))


def test_pauses_grow_are_jittered_and_obey_the_server() -> None:
    policy = RetryPolicy(base_seconds=0.5, max_seconds=4.0)
    for attempt, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (9, 4.0)):
        pauses = [policy.pause(attempt) for _ in range(200)]
        assert 0.0 <= min(pauses) < bound / 4
        assert bound * 0.75 < max(pauses) <= bound
    asked = OSError()
    asked.response = {"ResponseMetadata": {"HTTPHeaders": {"retry-after": "3"}}}
    assert s3_faults._retry_after(asked) == 3.0
    assert 3.0 <= policy.pause(1, 3.0) <= 4.0
    assert policy.pause(1, 60.0) == 4.0
