"""One object being written to S3: parts are sent while the next are filled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

from mergekit_ray.core.errors import StorageError
from mergekit_ray.storage.faults import discarded, wrong_size
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.storage.s3.checksums import Checksums
from mergekit_ray.storage.s3.faults import code_of, explained, was_retried

logger = logging.getLogger(__name__)

MIN_PART_BYTES = 16 << 20
_MAX_NUM_PARTS = 9000  # the limit of S3 is 10000
_MAX_IN_FLIGHT = 4
_NUM_COMPLETIONS = 3
_OF_A_DAMAGED_LIST = {"NoSuchUpload", "InvalidPart", "InvalidPartOrder"}
"""What servers say of a list of parts that was damaged on its way, and some of one that is right but has no upload."""

PART_GRAIN_BYTES = 1 << 20


def abort_upload(client: Any, upload: dict[str, str], where: str) -> None:
    """Abort a multipart upload, given its bucket, key and id, if it is there."""
    try:
        with explained("aborting", where):
            try:
                client.abort_multipart_upload(**upload)
            except Exception as error:
                if code_of(error) != "NoSuchUpload":
                    raise
    except StorageError as error:
        # Whatever made the caller abort matters more than this.
        logger.warning("an unfinished upload stays behind and is billed until removed: %s", error)


def complete_upload(
    client: Any,
    upload: Mapping[str, str],
    parts: Mapping[int, Mapping[str, Any]],
    find: Callable[[], str | None],
    where: str,
) -> str:
    """Complete a multipart upload; gives the object's version.

    Args:
        client: a boto3 S3 client, see `storage.s3.faults.retried`.
        upload: its bucket, key and id.
        parts: what the answer to each part's request said of it, by number.
        find: the version of the object already there, if it may be this one.
        where: URI, for messages.

    Raises:
        StorageError: the server failed, or somebody has aborted it.
    """
    listed = {"Parts": [{"PartNumber": number, **parts[number]} for number in sorted(parts)]}
    for tries_left in reversed(range(_NUM_COMPLETIONS)):
        with explained("completing", where):
            try:
                answer = client.complete_multipart_upload(**upload, MultipartUpload=listed)
            except Exception as error:
                code = code_of(error)
                if code not in _OF_A_DAMAGED_LIST:
                    raise
                # An earlier attempt whose answer was lost may have completed it.
                found = find() if code == "NoSuchUpload" and was_retried(error) else None
                if found is not None:
                    return found
                if not tries_left:
                    if code == "NoSuchUpload":
                        raise discarded(where) from error
                    raise
            else:
                return str(answer["ETag"]).strip('"')
    raise AssertionError("unreachable")


def part_bytes_for(num_bytes: int) -> int:
    """Size of the parts of an object of ``num_bytes``: 16 MiB, or whole MiB so that 9000 suffice."""
    needed = -(-num_bytes // _MAX_NUM_PARTS)
    return max(MIN_PART_BYTES, -(-needed // PART_GRAIN_BYTES) * PART_GRAIN_BYTES)


class S3Upload:
    """See `mergekit_ray.storage.protocols.Upload`.

    An object no larger than a part is one request, unless there is a guard. Otherwise at most 4 parts are in flight
    while one is filled, so an upload holds at most 5 buffers of `part_bytes_for`; those of the last parts are let go as
    each has been sent. A process that is killed leaves an unfinished multipart upload, which no reader sees; a
    lifecycle rule (AbortIncompleteMultipartUpload) removes those.

    Args:
        client: a boto3 S3 client, see `storage.s3.faults.retried`.
        executor: runs the parts; shared by all uploads of a store.
        stat: the store's `stat`.
        guard: see `GuardedSink.guarded`; None for none.
    """

    def __init__(
        self,
        client: Any,
        executor: Executor,
        *,
        bucket: str,
        key: str,
        name: str,
        num_bytes: int,
        stat: Callable[[str], FileStat | None],
        guard: Callable[[], None] | None = None,
    ) -> None:
        self._client = client
        self._guard = guard
        self._checksums = Checksums(client)
        self._executor = executor
        self._target = {"Bucket": bucket, "Key": key}
        self._where = f"s3://{bucket}/{key}"
        self._name = name
        self._num_bytes = num_bytes
        self._stat = stat
        self._part_bytes = part_bytes_for(num_bytes)
        self._num_written = 0
        self._num_parts = 0
        self._used = 0
        self._buffer = bytearray(min(self._part_bytes, num_bytes))
        self._free: list[bytearray] = []
        self._in_flight: set[Future[None]] = set()
        self._parts: dict[int, dict[str, Any]] = {}
        self._upload_id: str | None = None
        self._is_sent = False
        self._closed = False

    def write(self, data: memoryview | bytes) -> None:
        """See `Upload.write`. Waits while 4 parts are in flight.

        Raises:
            StorageError: a part could not be sent, or more bytes come than were announced.
        """
        if self._closed:
            raise ValueError(f"{self._where} is already committed or aborted")
        view = memoryview(data).cast("B")
        if self._num_written + len(view) > self._num_bytes:
            raise wrong_size(self._num_written + len(view), self._num_bytes, self._where)
        while view:
            if self._used == len(self._buffer):
                self._send()
            count = min(len(view), len(self._buffer) - self._used)
            self._buffer[self._used : self._used + count] = view[:count]
            self._used += count
            self._num_written += count
            view = view[count:]

    def commit(self) -> FileStat:
        """See `Upload.commit`."""
        if self._closed:
            raise ValueError(f"{self._where} is already committed or aborted")
        if self._num_written != self._num_bytes:
            raise wrong_size(self._num_written, self._num_bytes, self._where)
        del self._buffer[self._used :]
        if self._upload_id is None and self._guard is None:
            body = self._buffer
            checksum = self._checksums.of_body(body)
            with explained("writing", self._where):
                answer = self._client.put_object(**self._target, Body=body, **checksum)
            version = answer["ETag"].strip('"')
        else:
            self._send(last=True)
            self._collect(everything=True)
            assert self._upload_id is not None
            if self._guard is not None:
                self._guard()
            upload = {**self._target, "UploadId": self._upload_id}
            version = complete_upload(self._client, upload, self._parts, self._find, self._where)
        self._close()
        return FileStat(self._name, self._num_bytes, version)

    def abort(self) -> None:
        """See `Upload.abort`. Waits for parts in flight, since one that lands later would stay."""
        if self._closed:
            return
        for part in self._in_flight:
            part.cancel()
        wait(self._in_flight)
        upload_id, self._upload_id = self._upload_id, None
        self._close()
        if upload_id is None:
            return
        abort_upload(self._client, {**self._target, "UploadId": upload_id}, self._where)

    def _send(self, *, last: bool = False) -> None:
        """Hand the filled buffer to the executor and, unless it is the last, take a free one."""
        if self._upload_id is None:
            with explained("writing", self._where):
                answer = self._client.create_multipart_upload(**self._target, **self._checksums.of_upload)
            self._upload_id = answer["UploadId"]
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._collect(everything=False)
        self._num_parts += 1
        self._in_flight.add(self._executor.submit(self._send_part, self._upload_id, self._num_parts, self._buffer))
        self._used = 0
        if last:
            self._is_sent = True
            self._free.clear()
            self._buffer = bytearray()
        else:
            self._buffer = self._free.pop() if self._free else bytearray(self._part_bytes)

    def _send_part(self, upload_id: str, number: int, buffer: bytearray) -> None:
        checksum = self._checksums.of_body(buffer)
        part = {**self._target, "UploadId": upload_id, "PartNumber": number, **checksum}
        with explained(f"writing part {number}", self._where):
            answer = self._client.upload_part(**part, Body=buffer)
        self._parts[number] = {"ETag": answer["ETag"], **checksum}
        if not self._is_sent:
            self._free.append(buffer)

    def _collect(self, *, everything: bool) -> None:
        """Wait for one part (or all) and raise what went wrong with it."""
        done, pending = wait(self._in_flight, return_when="ALL_COMPLETED" if everything else FIRST_COMPLETED)
        self._in_flight = set(pending)
        for part in done:
            part.result()

    def _find(self) -> str | None:
        """The version of what is there, if that has our size."""
        found = self._stat(self._name)
        return found.version if found is not None and found.num_bytes == self._num_bytes else None

    def _close(self) -> None:
        self._closed = True
        self._buffer = bytearray()
        self._free.clear()
