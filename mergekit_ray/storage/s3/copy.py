"""What an S3 server does by itself when asked: copies within a bucket, the end of stale uploads."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Any, Final

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.storage.s3.faults import code_of, explained, status_of, was_retried
from mergekit_ray.storage.s3.upload import abort_upload

logger = logging.getLogger(__name__)

PART_BYTES: Final = 1 << 30
"""Of a copy. One request copies at most 5 GiB, and its answer may take minutes."""

_NUM_PARTS_AT_ONCE: Final = 8


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


def copy_all(copies: Sequence[Copy], client: Any, executor: Executor, bucket: str) -> None:
    """Copy objects within a bucket, as they were when they were looked at.

    The small ones are copied at the same time, and the parts of a large one.

    Args:
        copies: what to copy.
        client: a boto3 S3 client, see `storage.s3.faults.retried`.
        executor: runs the requests.
        bucket: that all is in.

    Raises:
        CheckpointError: an object changed meanwhile.
        StorageError: the server failed. Unfinished copies leave nothing behind.
    """
    small = [executor.submit(_copy, each, client, bucket) for each in copies if each.stat.num_bytes <= PART_BYTES]
    wait(small)
    for done in small:
        done.result()
    for each in copies:
        if each.stat.num_bytes > PART_BYTES:
            _copy(each, client, bucket)


def _copy(copy: Copy, client: Any, bucket: str) -> None:
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415 - boto3 loads only when used
    from s3transfer.exceptions import S3CopyFailedError  # noqa: PLC0415

    source = {"Bucket": bucket, "Key": copy.source}
    pinned = {"CopySourceIfMatch": f'"{copy.stat.version}"'}
    config = TransferConfig(
        multipart_threshold=PART_BYTES + 1, multipart_chunksize=PART_BYTES, max_concurrency=_NUM_PARTS_AT_ONCE
    )
    with explained("copying", copy.where):
        try:
            client.copy(source, bucket, copy.target, ExtraArgs=pinned, Config=config)
        except Exception as error:
            if status_of(error) == 412 or isinstance(error, S3CopyFailedError):
                raise CheckpointError(
                    "changed while it was being copied",
                    where=copy.where,
                    remedy="let nothing else write to this place, and run again to resume",
                ) from error
            if not (was_retried(error) and code_of(error) == "NoSuchUpload"):
                raise
            # An earlier attempt whose answer was lost may have completed it.
            there = client.head_object(Bucket=bucket, Key=copy.target)
            if there["ContentLength"] != copy.stat.num_bytes:
                raise


def abort_uploads(client: Any, bucket: str, keys: Collection[str], *, where: str) -> int:
    """Abort all unfinished multipart uploads to certain keys; gives their number. Does nothing where it may not.

    Raises:
        StorageError: the server failed.
    """
    if not keys:
        return 0
    uploads = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=_common_folder(keys))
    try:
        with explained("listing unfinished uploads", where):
            listed = [upload for page in uploads for upload in page.get("Uploads", ())]
    except StorageError as error:
        if error.retryable:
            raise
        logger.info("unfinished uploads of killed processes are left to the bucket's lifecycle rule: %s", error)
        return 0
    found = [upload for upload in listed if upload["Key"] in keys]
    for upload in found:
        abort_upload(client, {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}, where)
    return len(found)


def _common_folder(keys: Collection[str]) -> str:
    first, last = min(keys), max(keys)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same].rpartition("/")[0]
