"""Work that an S3 server does on request: copies within a bucket, and aborting stale uploads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from typing import Any, Final

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.storage.s3.faults import code_of, explained, status_of
from mergekit_ray.storage.s3.upload import abort_upload, complete_upload

logger = logging.getLogger(__name__)

PART_BYTES: Final = 1 << 30
"""Of a copy. One request copies at most 5 GiB, and its answer may take minutes."""


@dataclass(frozen=True, slots=True)
class Copy:
    """An object to be copied.

    Attributes:
        source, target: keys.
        stat: of the source.
        where: the source's URI.
    """

    source: str
    target: str
    stat: FileStat
    where: str


def copy_all(copies: Sequence[Copy], client: Any, executor: Executor, bucket: str, guard: Callable[[], None]) -> None:
    """Copy objects within a bucket, as they were when they were looked at.

    Each is a multipart upload whose parts the server copies: boto3's ``copy`` completes it without asking anybody.

    Args:
        copies: what to copy.
        client: a boto3 S3 client, see `storage.s3.faults.retried`.
        executor: runs the requests.
        bucket: that all is in.
        guard: called once everything is copied and nothing of it is to be seen yet.

    Raises:
        CheckpointError: an object changed meanwhile.
        StorageError: the server failed. Unfinished copies leave nothing behind.
    """
    begun: list[tuple[Copy, _Parts]] = []
    try:
        for each in copies:
            with explained("copying", each.where):
                answer = client.create_multipart_upload(Bucket=bucket, Key=each.target)
            begun.append((each, _Parts({"Bucket": bucket, "Key": each.target, "UploadId": answer["UploadId"]})))
        requests = [
            executor.submit(_copy_part, each, parts, number, client)
            for each, parts in begun
            for number in range(1, 1 + max(1, -(-each.stat.num_bytes // PART_BYTES)))
        ]
        wait(requests)
        for request in requests:
            request.result()
        guard()
        while begun:
            _complete(*begun[-1], client)
            begun.pop()
    finally:
        for each, parts in begun:
            abort_upload(client, parts.upload, each.where)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A multipart upload and its parts' ETags by their numbers."""

    upload: dict[str, str]
    etags: dict[int, str] = field(default_factory=dict)


def _copy_part(copy: Copy, parts: _Parts, number: int, client: Any) -> None:
    request: dict[str, Any] = {**parts.upload, "PartNumber": number}
    start, total = (number - 1) * PART_BYTES, copy.stat.num_bytes
    with explained("copying", copy.where):
        if not total:  # there are no ranges of nothing, and not every server copies it
            parts.etags[number] = client.upload_part(**request, Body=b"")["ETag"]
            return
        request["CopySource"] = {"Bucket": parts.upload["Bucket"], "Key": copy.source}
        request["CopySourceIfMatch"] = f'"{copy.stat.version}"'
        if total > PART_BYTES:
            request["CopySourceRange"] = f"bytes={start}-{min(start + PART_BYTES, total) - 1}"
        try:
            parts.etags[number] = client.upload_part_copy(**request)["CopyPartResult"]["ETag"]
        except Exception as error:
            if status_of(error) != 412 and code_of(error) != "NoSuchKey":
                raise
            raise CheckpointError(
                "changed while it was being copied",
                where=copy.where,
                remedy="let nothing else write to this place, and run again to resume",
            ) from error


def _complete(copy: Copy, parts: _Parts, client: Any) -> None:
    def find() -> str | None:
        there = client.head_object(Bucket=parts.upload["Bucket"], Key=copy.target)
        return str(there["ETag"]) if there["ContentLength"] == copy.stat.num_bytes else None

    etags = {number: {"ETag": etag} for number, etag in parts.etags.items()}
    complete_upload(client, parts.upload, etags, find, copy.where)


def abort_uploads(client: Any, bucket: str, prefix: str, is_meant: Callable[[str], bool], *, where: str) -> int | None:
    """Abort unfinished multipart uploads; gives their number, or None where that is not allowed.

    Args:
        client: a boto3 S3 client.
        bucket: that they are in.
        prefix: of their keys.
        is_meant: whether to abort that to a key.
        where: URI, for messages.

    Raises:
        StorageError: the server failed.
    """
    uploads = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    try:
        with explained("listing unfinished uploads", where):
            listed = [upload for page in uploads for upload in page.get("Uploads", ())]
    except StorageError as error:
        if error.retryable:
            raise
        logger.info("unfinished uploads of killed processes are left to the bucket's lifecycle rule: %s", error)
        return None
    found = [upload for upload in listed if is_meant(upload["Key"])]
    for upload in found:
        abort_upload(client, {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}, where)
    return len(found)
