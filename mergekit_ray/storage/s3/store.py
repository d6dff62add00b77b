"""Buckets of Amazon S3 and of servers that speak its protocol."""

from __future__ import annotations

import builtins
import contextlib
import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergekit_ray.core.errors import CheckpointError, ConfigError, ModelError, StorageError
from mergekit_ray.core.sizes import counted
from mergekit_ray.storage.faults import ShortBodyError, changed, missing
from mergekit_ray.storage.fence import LEASE_FILE, allow_all
from mergekit_ray.storage.names import check_name
from mergekit_ray.storage.protocols import FileStat, WritableBuffer
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.s3.checksums import Checksums
from mergekit_ray.storage.s3.client import make_client
from mergekit_ray.storage.s3.copy import Copy, abort_uploads, copy_all
from mergekit_ray.storage.s3.faults import code_of, explained, retried, status_of, was_retried, with_retries
from mergekit_ray.storage.s3.upload import S3Upload
from mergekit_ray.storage.schemes import SCHEMES
from mergekit_ray.storage.transfers import NUM_READERS, RangeReader, RetryPolicy, read_whole, write_whole

_CHUNK_BYTES = 1 << 20
_NUM_WRITERS = 8
_DELETE_BATCH = 1000
_NOT_THERE = {"NoSuchKey", "404", "NotFound"}


class S3Store:
    """A prefix of a bucket, read and written.

    Credentials, region and endpoint come from boto3's chain (environment, ``~/.aws``, roles). A file's version is its
    ETag; reads are conditional on it. `put_if_absent` and `replace` are conditional writes (``If-None-Match: *`` and
    ``If-Match``); servers that ignore the conditions (MinIO's gateway mode, rclone) cannot promise a single winner.

    What is written carries its CRC32, which the server checks (see `storage.s3.checksums`), and over HTTPS no
    signature of the body beside it. ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required`` leaves it out for a server that
    cannot check it.

    As a `GuardedSink` it writes all files as multipart uploads, which cannot be completed once aborted, and so keeps
    the whole promise for writes. A deletion cannot be prepared. It is conditional on the ETag that the file had before
    the guard was called, so a file that another driver has written since stays, unless it has the same bytes. A server
    that ignores the condition may carry out a deletion that was requested before the lease was lost.

    Args:
        client: a boto3 S3 client; by default one is made at the first use.
    """

    def __init__(self, bucket: str, prefix: str = "", *, client: Any = None, retry: RetryPolicy | None = None) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._retry = retry or RetryPolicy()
        self._made_client = None if client is None else retried(client, self._retry)
        self._reader = RangeReader("s3-read")
        self._write_pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._guard: Callable[[], None] | None = None

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def close(self) -> None:
        """End the threads and connections. The store can still be used; it opens new ones."""
        with self._lock:
            pool, self._write_pool = self._write_pool, None
            client, self._made_client = self._made_client, None
        self._reader.close()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        if client is not None:
            client.close()

    def list(self) -> builtins.list[FileStat]:
        """See `Source.list`."""
        base = f"{self._prefix}/" if self._prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=base)
        with explained("listing", self.uri):
            entries = [entry for page in pages for entry in page.get("Contents", ())]
        named = [(entry["Key"][len(base) :], entry) for entry in entries]
        found = [
            FileStat(name, entry["Size"], entry["ETag"].strip('"'))
            for name, entry in named
            if name and not name.endswith("/")
        ]
        return sorted(found, key=lambda file: file.name)

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        key = self._key(name)

        with explained("looking up", self._where(name)):
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=key)
            except Exception as error:
                if code_of(error) in _NOT_THERE:
                    return None
                raise
        return FileStat(name, answer["ContentLength"], answer["ETag"].strip('"'))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return read_whole(self, name, max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        key = self._key(name)

        def attempt() -> tuple[bytes, FileStat]:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=0-{max(num_bytes, 1) - 1}")
            except Exception as error:
                if code_of(error) in _NOT_THERE:
                    raise missing(self._where(name)) from error
                if status_of(error) == 416:  # an empty object has no ranges
                    stat = self._stat_of(name)
                    if stat.num_bytes:
                        raise ShortBodyError("a range was refused that the object has") from error
                    return b"", stat
                raise
            with contextlib.closing(answer["Body"]) as body:
                total = _total_bytes(answer)
                data = bytearray(min(num_bytes, total))
                _fill(body, memoryview(data))
            return bytes(data), FileStat(name, total, answer["ETag"].strip('"'))

        return with_retries(self._retry, attempt, doing="reading", where=self._where(name))

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges` and `RangeReader`. A request that breaks off goes on where it broke off."""
        return self._reader.read(ranges, buffers, lambda fetch: self._fetch(name, fetch, version))

    def open(self, name: str, num_bytes: int) -> S3Upload:
        """See `Sink.open`. Nothing is sent until a part is full."""
        return S3Upload(
            self._client,
            self._writers,
            bucket=self._bucket,
            key=self._key(name),
            name=name,
            num_bytes=num_bytes,
            stat=self.stat,
            guard=self._guard,
        )

    def put(self, name: str, data: bytes) -> FileStat:
        """See `Sink.put`."""
        return write_whole(self, name, data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Sink.put_if_absent`. Racers must write different data: it tells a lost answer from a lost race."""
        return self._put_if(name, data, IfNoneMatch="*") is not None

    def replace(self, name: str, data: bytes, *, version: str) -> FileStat | None:
        """See `ConditionalSink.replace`: ``If-Match``. Racers must write different data, as for `put_if_absent`."""
        etag = self._put_if(name, data, IfMatch=f'"{version}"')
        return None if etag is None else FileStat(name, len(data), etag)

    def move(self, names: Mapping[str, str]) -> None:
        """See `MovingSink.move`: copies that the server makes, then the originals are deleted."""
        copies = [
            Copy(self._key(old), self._key(new), self._stat_of(old), self._where(old)) for old, new in names.items()
        ]
        copy_all(copies, self._client, self._writers, self._bucket, self._guard or allow_all)
        self.delete(sorted(names.keys() - set(names.values())))

    def guarded(self, guard: Callable[[], None]) -> S3Store:
        """See `GuardedSink.guarded`. It shares this store's connections and threads."""
        _ = self._client, self._writers  # made now, they are shared
        store = copy.copy(self)
        store._guard = guard  # noqa: SLF001 - of this class
        return store

    def discard_remains(self, names: Collection[str] | None = None) -> int | None:
        """See `RemainsSink.discard_remains`. Lists and aborts multipart uploads, for which it needs permissions."""
        base = f"{self._prefix}/" if self._prefix else ""
        if names is not None and not names:
            return 0
        is_meant = _is_in_root_or_dotted if names is None else frozenset(names).__contains__
        return abort_uploads(
            self._client, self._bucket, base, lambda key: is_meant(key.removeprefix(base)), where=self.uri
        )

    def delete(self, names: Sequence[str]) -> None:
        """See `Sink.delete`."""
        objects: list[dict[str, str]] = [{"Key": self._key(name)} for name in names]
        if self._guard is not None and names:
            versions = {self._key(stat.name): stat.version for stat in self.list()}
            objects = [{**each, "ETag": f'"{versions[each["Key"]]}"'} for each in objects if each["Key"] in versions]
            self._guard()
        for first in range(0, len(objects), _DELETE_BATCH):
            self._delete_batch(objects[first : first + _DELETE_BATCH])

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._made_client is None:
                made = make_client(self.uri, num_connections=NUM_READERS + 2 * _NUM_WRITERS)
                self._made_client = retried(made, self._retry)
            return self._made_client

    @property
    def _writers(self) -> ThreadPoolExecutor:
        # Apart from the readers: a full read-ahead must not hold up what is being written.
        with self._lock:
            if self._write_pool is None:
                self._write_pool = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="s3-write")
            return self._write_pool

    def _put_if(self, name: str, data: bytes, **condition: str) -> str | None:
        """Write a file on a condition; gives its version, None if the condition does not hold."""
        key = self._key(name)
        checksum = Checksums(self._client).of_body(data)
        with explained("writing", self._where(name)):
            try:
                answer = self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **condition, **checksum)
            except Exception as error:
                if status_of(error) != 412 and code_of(error) not in _NOT_THERE:
                    raise
                # An earlier attempt whose answer was lost may have made the condition false.
                return self._etag_of(name, data) if was_retried(error) else None
        return str(answer["ETag"]).strip('"')

    def _delete_batch(self, objects: Sequence[Mapping[str, str]]) -> None:
        batch = {"Objects": objects, "Quiet": True}
        with explained("deleting", self.uri):
            answer = self._client.delete_objects(Bucket=self._bucket, Delete=batch)
        failed = [error for error in answer.get("Errors", ()) if error.get("Code") != "NoSuchKey"]
        if failed:
            key, code = failed[0].get("Key"), failed[0].get("Code")
            raise StorageError(
                f"{counted(len(failed), 'file')} could not be deleted, the first is {key!r} ({code})",
                where=self.uri,
                remedy="another merge writes there: let only one do so"
                if code == "PreconditionFailed"
                else "check that these credentials may delete here",
            )

    def _key(self, name: str) -> str:
        check_name(name, self.uri)
        return f"{self._prefix}/{name}" if self._prefix else name

    def _where(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def _stat_of(self, name: str) -> FileStat:
        stat = self.stat(name)
        if stat is None:
            raise missing(self._where(name))
        return stat

    def _etag_of(self, name: str, data: bytes) -> str | None:
        """The version of a file if it holds these bytes."""
        try:
            found, stat = self.read_head(name, len(data) + 1)
        except CheckpointError:
            return None
        return stat.version if found == data else None

    def _fetch(self, name: str, fetch: Fetch, version: str | None) -> None:
        with_retries(
            self._retry,
            lambda: self._fetch_once(name, fetch, version),
            doing=f"reading bytes {fetch.start} to {fetch.end}",
            where=self._where(name),
        )

    def _fetch_once(self, name: str, fetch: Fetch, version: str | None) -> None:
        condition = {} if version is None else {"IfMatch": f'"{version}"'}
        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(name), Range=f"bytes={fetch.position}-{fetch.end - 1}", **condition
            )
        except Exception as error:
            if status_of(error) == 412:  # precondition failed
                raise changed(self._where(name)) from error
            if code_of(error) in _NOT_THERE:
                raise missing(self._where(name)) from error
            if status_of(error) == 416:  # the object ends before the range starts
                raise self._cut_short(name, fetch.end) from error
            raise
        with contextlib.closing(answer["Body"]) as body:
            if version is not None and answer["ETag"].strip('"') != version:
                raise changed(self._where(name))  # a server that ignores the condition
            if fetch.end > _total_bytes(answer, start=fetch.position):
                raise self._cut_short(name, fetch.end)
            for num_skipped, buffer in fetch.remaining():
                for view in (memoryview(bytearray(num_skipped)), buffer):
                    _fill(body, view, fetch)

    def _cut_short(self, name: str, end: int) -> CheckpointError:
        return CheckpointError(
            f"ends before byte {end - 1}, which is asked for",
            where=self._where(name),
            remedy="the file is cut short: upload it again",
        )


def _is_in_root_or_dotted(name: str) -> bool:
    """Whether a file is one that a merge into this place writes, and not that of another model in a folder below."""
    return ("/" not in name or name.startswith(".")) and name != LEASE_FILE


def _fill(body: Any, view: memoryview, fetch: Fetch | None = None) -> None:
    """Read from an answer until ``view`` is full, advancing ``fetch`` by what arrives.

    Raises:
        ShortBodyError: the answer ended first.
    """
    while view:
        count = body.readinto(view[:_CHUNK_BYTES])
        if not count:
            raise ShortBodyError(f"the answer ended {len(view)} bytes early")
        if fetch is not None:
            fetch.position += count
        view = view[count:]


def _total_bytes(answer: dict[str, Any], start: int = 0) -> int:
    """Size of the object an answer to a range request comes from.

    Raises:
        StorageError: the server sent something else than the range.
    """
    content_range = answer.get("ContentRange")
    if content_range:
        span, _, total = content_range.removeprefix("bytes ").partition("/")
        if span.partition("-")[0] == str(start) and total.isdigit():
            return int(total)
    elif start == 0:
        return int(answer["ContentLength"])  # the whole object
    raise StorageError(
        "the server does not answer range requests as S3 does",
        where=f"Content-Range: {content_range}",
        remedy="use a server that supports ranged GetObject",
    )


@SCHEMES.register("s3")
def open_bucket(uri: str, revision: str | None) -> S3Store:
    """The store at ``s3://bucket/prefix``.

    Raises:
        ConfigError: no bucket is named, or the URI holds more than a bucket and a prefix.
        ModelError: a revision is given.
    """
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket:
        raise ConfigError(
            "an s3:// URI holds a bucket and a prefix, no credentials and no port",
            where="s3://…",
            remedy="give credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the server by AWS_ENDPOINT_URL",
        )
    if not bucket:
        raise ConfigError("no bucket is named", where=uri, remedy="write s3://bucket/prefix")
    if revision is not None:
        raise ModelError(
            f"a prefix of a bucket has no revision {revision!r}", where=uri, remedy="leave out what follows the '@'"
        )
    for part in prefix.strip("/").split("/") if prefix.strip("/") else ():
        check_name(part, uri)
    return S3Store(bucket, prefix)
