"""What an S3 server does by itself when asked: copies within a bucket, conditional writes, the end of stale uploads."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Any, Final

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.storage.s3.checksums import Checksums
from mergekit_ray.storage.s3.faults import code_of, status_of, with_retries
from mergekit_ray.storage.transfers import RetryPolicy

logger = logging.getLogger(__name__)

PART_BYTES: Final = 1 << 30
"""Of a copy. One request copies at most 5 GiB, and its answer may take minutes."""

_NOT_AS_EXPECTED: Final = {404, 412}


def put_if_match(client: Any, bucket: str, key: str, data: bytes, etag: str) -> str | None:
    """Write an object if the one that is there has this ETag; gives the new one, None if it has not."""
    checksum = Checksums(client).of_body(data)
    try:
        answer = client.put_object(Bucket=bucket, Key=key, Body=data, IfMatch=f'"{etag}"', **checksum)
    except Exception as error:
        if status_of(error) not in _NOT_AS_EXPECTED or code_of(error) == "NoSuchBucket":
            raise
        return None
    return str(answer["ETag"]).strip('"')


@dataclass(frozen=True, slots=True)
class Copy:
    """An object to be copied.

    Attributes:
        source, target: keys.
        stat: of the source, None if it is not there.
        where: the source's URI.
    """

    source: str
    target: str
    stat: FileStat | None
    where: str


class Copies:
    """Copies objects within a bucket, as they were when they were looked at.

    Args:
        client: a boto3 S3 client.
        executor: runs the requests.
        retry: how often and how soon requests are tried again.
        bucket: that all is in.
    """

    def __init__(self, client: Any, executor: Executor, retry: RetryPolicy, bucket: str) -> None:
        self._client = client
        self._executor = executor
        self._retry = retry
        self._bucket = bucket

    def run(self, copies: Sequence[Copy]) -> None:
        """Copy all, the small ones at the same time, the parts of a large one at the same time.

        Raises:
            CheckpointError: an object is not there, or changed meanwhile.
            StorageError: the server failed. Unfinished copies leave nothing behind.
        """
        for copy in copies:
            if copy.stat is None:
                raise CheckpointError("no such file", where=copy.where)
        small = [copy for copy in copies if copy.stat is not None and copy.stat.num_bytes <= PART_BYTES]
        _all_of([self._executor.submit(self._copy, copy) for copy in small])
        for copy in copies:
            if copy not in small:
                self._copy_in_parts(copy)

    def _copy(self, copy: Copy) -> None:
        self._ask("copy_object", copy, Key=copy.target, MetadataDirective="COPY")

    def _copy_in_parts(self, copy: Copy) -> None:
        assert copy.stat is not None
        target = {"Bucket": self._bucket, "Key": copy.target}
        made = with_retries(
            self._retry, lambda _: self._client.create_multipart_upload(**target), doing="copying", where=copy.where
        )
        upload = {**target, "UploadId": made["UploadId"]}
        size = copy.stat.num_bytes
        spans = [(start, min(start + PART_BYTES, size) - 1) for start in range(0, size, PART_BYTES)]
        try:
            answers = _all_of(
                [
                    self._executor.submit(
                        self._ask,
                        "upload_part_copy",
                        copy,
                        Key=copy.target,
                        UploadId=upload["UploadId"],
                        PartNumber=number,
                        CopySourceRange=f"bytes={first}-{last}",
                    )
                    for number, (first, last) in enumerate(spans, 1)
                ]
            )
            parts = [
                {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}
                for number, answer in enumerate(answers, 1)
            ]
            with_retries(
                self._retry,
                lambda _: self._complete(upload, parts, size),
                doing="completing a copy",
                where=copy.where,
            )
        except BaseException:
            _abort(self._client, self._retry, upload, copy.where)
            raise

    def _complete(self, upload: dict[str, str], parts: list[dict[str, Any]], num_bytes: int) -> None:
        try:
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except Exception as error:
            # An earlier attempt whose answer was lost may have completed it.
            if code_of(error) != "NoSuchUpload":
                raise
            there = self._client.head_object(Bucket=upload["Bucket"], Key=upload["Key"])
            if there["ContentLength"] != num_bytes:
                raise

    def _ask(self, request: str, copy: Copy, **arguments: Any) -> dict[str, Any]:
        assert copy.stat is not None
        source = {"Bucket": self._bucket, "Key": copy.source}
        etag = f'"{copy.stat.version}"'

        def attempt(_: int) -> dict[str, Any]:
            try:
                answer: dict[str, Any] = getattr(self._client, request)(
                    Bucket=self._bucket, CopySource=source, CopySourceIfMatch=etag, **arguments
                )
            except Exception as error:
                if status_of(error) == 412:
                    raise CheckpointError(
                        "changed while it was being copied",
                        where=copy.where,
                        remedy="let nothing else write to this place, and run again to resume",
                    ) from error
                raise
            return answer

        return with_retries(self._retry, attempt, doing="copying", where=copy.where)


def abort_uploads(client: Any, retry: RetryPolicy, bucket: str, keys: Collection[str], *, where: str) -> int:
    """Abort all unfinished multipart uploads to certain keys; gives their number. Does nothing where it may not.

    Raises:
        StorageError: the server failed.
    """
    if not keys:
        return 0
    try:
        found = [upload for upload in _unfinished(client, retry, bucket, keys, where=where) if upload["Key"] in keys]
    except StorageError as error:
        if error.retryable:
            raise
        logger.info("unfinished uploads of killed processes are left to the bucket's lifecycle rule: %s", error)
        return 0
    for upload in found:
        _abort(client, retry, upload, where)
    return len(found)


def _unfinished(
    client: Any, retry: RetryPolicy, bucket: str, keys: Collection[str], *, where: str
) -> list[dict[str, str]]:
    """Unfinished multipart uploads in the folder that holds all keys."""
    found: list[dict[str, str]] = []
    place = {"Bucket": bucket, "Prefix": _common_folder(keys)}

    def list_page(_: int) -> dict[str, Any]:
        page: dict[str, Any] = client.list_multipart_uploads(**place)
        return page

    while True:
        page = with_retries(retry, list_page, doing="listing unfinished uploads", where=where)
        found += [
            {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]} for each in page.get("Uploads", ())
        ]
        if not page.get("IsTruncated"):
            return found
        place |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _abort(client: Any, retry: RetryPolicy, upload: dict[str, str], where: str) -> None:
    def attempt(_: int) -> None:
        try:
            client.abort_multipart_upload(**upload)
        except Exception as error:
            if code_of(error) != "NoSuchUpload":
                raise

    try:
        with_retries(retry, attempt, doing="aborting", where=where)
    except StorageError as error:
        # Whatever made the caller abort matters more than this.
        logger.warning("an unfinished upload stays behind and is billed until removed: %s", error)


def _common_folder(keys: Collection[str]) -> str:
    first, last = min(keys), max(keys)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same].rpartition("/")[0]


def _all_of(futures: Sequence[Future[Any]]) -> list[Any]:
    """Results in order, once all have ended; raises the first error."""
    wait(futures)
    return [future.result() for future in futures]
