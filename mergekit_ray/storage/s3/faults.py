"""What can go wrong between this process and an S3 server: what is worth another try, and what to tell the user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from mergekit_ray.core.errors import StorageError
from mergekit_ray.storage.faults import (
    FULL_STATUS,
    TRANSIENT_STATUS,
    ShortBodyError,
    failed,
    full,
    is_untrusted,
    untrusted,
)
from mergekit_ray.storage.transfers import RetryPolicy, retry

T = TypeVar("T")

_TRANSIENT_CODES = {
    # Bodies that were damaged on their way; the XML of our requests is botocore's.
    "BadDigest",
    "MalformedXML",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}

_FULL_CODES = {"InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
"""Amazon's has no end. Servers send these with several statuses, some of which would be worth another try."""

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use ~/.aws/credentials or the machine's role"
)
_REMEDY_BY_CODE = {
    "AccessDenied": "these credentials may not do this here: check the bucket's policy and the role",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "ExpiredToken": "the session has expired: log in again, and run again to resume",
    "InvalidAccessKeyId": "the server does not know this access key: check the credentials and AWS_ENDPOINT_URL",
    "NoSuchBucket": "create the bucket, or check its name and AWS_ENDPOINT_URL",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials",
}


def retried(client: Any, policy: RetryPolicy) -> Any:
    """The boto3 client, which from now on sends a request again whose fault may pass; `with_retries` does for reads.

    botocore sends and signs anew, and we say when. Its own modes give up too early: the quota of ``standard`` and
    ``adaptive`` is used up when 24 requests at once meet an error 500 twice, and none resends a damaged body.
    """
    from botocore.exceptions import ClientError  # noqa: PLC0415 - boto3 loads only when used

    def needs_retry(
        *, attempts: int, operation: Any, response: Any, caught_exception: Exception | None, **_: Any
    ) -> float | None:
        error = caught_exception
        if response is not None and response[0].status_code >= 300:
            error = ClientError(response[1], operation.name)
        if error is None or operation.name == "GetObject":
            return None
        if attempts < policy.max_attempts and is_transient(error):
            return policy.pause(attempts, _retry_after(error))
        if caught_exception is not None:
            caught_exception.response = {"ResponseMetadata": {"RetryAttempts": attempts - 1}}  # type: ignore[attr-defined] # botocore's, untyped
        return None

    client.meta.events.register("needs-retry.s3", needs_retry, unique_id="mergekit-ray")
    return client


@contextlib.contextmanager
def explained(doing: str, where: str) -> Iterator[None]:
    """Raise what goes wrong with the requests inside as the error that a user sees.

    Args:
        doing: what they are for, in words: "writing".
        where: the URI they concern.

    Raises:
        StorageError: a fault that another try will not cure, or one that outlasted the retries.
    """
    try:
        yield
    except _kinds() as error:
        raise explain(error, doing=doing, where=where, num_attempts=1 + _num_retries(error)) from error


def with_retries(policy: RetryPolicy, attempt: Callable[[], T], *, doing: str, where: str) -> T:
    """``attempt()`` until it succeeds: reads an answer to GetObject, and goes on from the byte it had reached.

    Raises:
        StorageError: see `explained`.
    """
    return retry(
        policy,
        attempt,
        kinds=_kinds(),
        is_transient=is_transient,
        asked_seconds=_retry_after,
        explain=partial(explain, doing=doing, where=where),
    )


def was_retried(error: Exception) -> bool:
    """Whether an earlier attempt at the request may have been carried out, its answer lost."""
    return _num_retries(error) > 0


def status_of(error: Exception) -> int:
    """HTTP status of an error answer; 0 if the error is not one."""
    return int(_metadata(error).get("HTTPStatusCode", 0))


def code_of(error: Exception) -> str:
    """S3's error code, such as ``NoSuchKey``; the status in digits if the answer had no body; empty if no answer."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed if sent again."""
    from botocore import exceptions  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    if isinstance(error, exceptions.ClientError):
        passes = status_of(error) in TRANSIENT_STATUS or code_of(error) in _TRANSIENT_CODES
        return passes and not _is_full(error)
    if isinstance(error, exceptions.SSLError):
        return not is_untrusted(error)
    kinds = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        HTTPError,  # what botocore does not translate while a body is read
        ConnectionError,
        TimeoutError,
        ShortBodyError,
    )
    return isinstance(error, kinds)


def explain(error: Exception, *, doing: str, where: str, num_attempts: int = 1) -> StorageError:
    """The error a user sees. Neither the request nor its headers are quoted, so no credential can be."""
    from botocore import exceptions  # noqa: PLC0415

    what = failed(doing, num_attempts)
    if isinstance(error, exceptions.ClientError):
        code, status = code_of(error), status_of(error)
        named = code if code and not code.isdigit() else "no reason given"
        if _is_full(error):
            make_room = "free some space there, have the bucket's quota raised, or choose another place"
            return full(f"{what}: there is no room: the server answered {status} ({named})", where, make_room)
        remedy = _REMEDY_BY_CODE.get(code)
        if remedy is None and status in (401, 403):
            remedy = f"access is denied: {_CREDENTIALS}"
        if remedy is None and is_transient(error):
            remedy = "the server is overloaded or failing: run again to resume"
        return StorageError(
            f"{what}: the server answered {status} ({named})",
            where=where,
            remedy=remedy or "check the bucket and AWS_ENDPOINT_URL",
            retryable=is_transient(error),
        )
    credentials = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.TokenRetrievalError,
        exceptions.ProfileNotFound,
    )
    if isinstance(error, credentials):
        return StorageError(
            f"{doing} failed: no usable credentials ({type(error).__name__})",
            where=where,
            remedy=_CREDENTIALS,
            retryable=False,
        )
    if isinstance(error, exceptions.SSLError):
        return untrusted(what, where, "AWS_CA_BUNDLE")
    if is_transient(error):
        remedy = "check the network and AWS_ENDPOINT_URL, and run again to resume"
        return StorageError(f"{what}: {type(error).__name__}", where=where, remedy=remedy)
    return StorageError(
        f"{doing} failed: {type(error).__name__}: {error}",
        where=where,
        remedy="check the URI and the AWS settings",
        retryable=False,
    )


def _is_full(error: Exception) -> bool:
    return status_of(error) == FULL_STATUS or code_of(error) in _FULL_CODES


def _kinds() -> tuple[type[Exception], ...]:
    """The exceptions by which a request fails."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    return BotoCoreError, ClientError, HTTPError, OSError


def _response(error: Exception) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _metadata(error: Exception) -> dict[str, Any]:
    metadata: dict[str, Any] = _response(error).get("ResponseMetadata", {})
    return metadata


def _num_retries(error: Exception) -> int:
    return int(_metadata(error).get("RetryAttempts", 0))


def _retry_after(error: Exception) -> float:
    headers = _metadata(error).get("HTTPHeaders", {})
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:  # a date
        return 0.0
