"""What can go wrong between this process and the Hub: what is worth another try, and what to tell the user.

No message quotes a request, its headers or the address it was redirected to, so no token and no signature can be in
one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from mergekit_ray.core.errors import MergekitRayError, ModelError, StorageError
from mergekit_ray.storage.faults import (
    FULL_STATUS,
    TRANSIENT_STATUS,
    ShortBodyError,
    failed,
    full,
    is_untrusted,
    missing,
    untrusted,
)
from mergekit_ray.storage.transfers import RetryPolicy, retry

T = TypeVar("T")

LOG_IN: Final = "log in with `hf auth login`, or set HF_TOKEN"

_STALE_STATUS: Final = {400, 401, 403, 404, 410}
"""How stores answer when a signed address has expired."""


class BackingStoreError(OSError):
    """An error answer of the store behind the Hub. Its address is a credential, so nothing of it is kept.

    Args:
        status: of the answer.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the store behind the Hub answered {status}")
        self.status = status

    @property
    def stale(self) -> bool:
        """Whether the address may only have expired, so that a new one is worth a try."""
        return self.status in _STALE_STATUS


class CommitConflictError(OSError):
    """Another commit came first."""


class UploadError(OSError):
    """An upload broke off for a reason that huggingface_hub does not tell apart."""


class NotOnHubError(ModelError):
    """What is named is not on the Hub, or is kept from this login as if it were not.

    Attributes:
        has_repository: only the revision is missing.
    """

    has_repository: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request is about, for messages.

    Attributes:
        name: of the repository.
        revision: as the user gave it, or the commit.
        page: address of the repository's page.
        file: name of a file in it, empty if it is about the repository.
        is_written: whether it is to be written to.
    """

    name: str
    revision: str | None
    page: str
    file: str = ""
    is_written: bool = False

    @property
    def uri(self) -> str:
        """``hf://org/name@revision/file``."""
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.name}{at}" + (f"/{self.file}" if self.file else "")


def with_retries(policy: RetryPolicy, attempt: Callable[[], T], *, doing: str, subject: Subject) -> T:
    """``attempt()`` until it succeeds.

    Raises:
        ModelError: the repository or revision is not there, or not for this login.
        CheckpointError: there is no such file.
        StorageError: any other fault that another try will not cure, or one that outlasted the policy.
    """
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    # The base of all faults of the HTTP library: httpx for some versions of huggingface_hub, httpx2 for others.
    http_error = HfHubHTTPError.__bases__[0]
    return retry(
        policy,
        attempt,
        kinds=(http_error, OSError),
        is_transient=is_transient,
        explain=partial(explain, doing=doing, subject=subject),
    )


def status_of(error: Exception) -> int:
    """HTTP status of an error answer; 0 if the error is not one."""
    if isinstance(error, BackingStoreError):
        return error.status
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed if sent again."""
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if status_of(error):
        return status_of(error) in TRANSIENT_STATUS or (isinstance(error, BackingStoreError) and error.stale)
    if isinstance(error, ShortBodyError | CommitConflictError | UploadError | ConnectionError | TimeoutError):
        return True
    if is_untrusted(error):
        return False
    return any(isinstance(error, kind) for kind in _transport_faults())


def explain(error: Exception, *, doing: str, subject: Subject, num_attempts: int = 1) -> MergekitRayError:
    """The error a user sees."""
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, errors.HfHubHTTPError):
        refused = _refusal(error, subject)
        if refused is not None:
            return refused
    what = failed(doing, num_attempts)
    status = status_of(error)
    if status == 429:
        more = "" if has_token() else f"; limits are higher for users: {LOG_IN}"
        return StorageError(
            f"{what}: the Hub's rate limit is reached",
            where=subject.uri,
            remedy=f"wait some minutes, and run again to resume{more}",
        )
    if status == FULL_STATUS:
        return full(f"{what}: there is no room for it", subject.uri, "free some space of this account")
    if status:
        answered = "the store behind the Hub" if isinstance(error, BackingStoreError) else "the Hub"
        passing = is_transient(error)
        return StorageError(
            f"{what}: {answered} answered {status}",
            where=subject.uri,
            remedy="it is overloaded or failing: run again to resume" if passing else "check HF_ENDPOINT",
            retryable=passing,
        )
    return _unreachable(error, what, subject)


def has_token() -> bool:
    """Whether requests carry a token of the user."""
    from huggingface_hub import constants, get_token  # noqa: PLC0415

    return not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and get_token() is not None


def _refusal(error: Any, subject: Subject) -> MergekitRayError | None:
    """The Hub's answer that this is not there, or not for this login; None if it is another."""
    from huggingface_hub import errors  # noqa: PLC0415

    repository = f"hf://{subject.name}"
    if isinstance(error, errors.EntryNotFoundError):
        return missing(subject.uri)
    if isinstance(error, errors.RevisionNotFoundError):
        unknown = NotOnHubError(
            f"there is no branch, tag or commit {subject.revision!r}",
            where=repository,
            remedy=f"see which there are at {subject.page}/tree/main",
        )
        unknown.has_repository = True
        return unknown
    if isinstance(error, errors.GatedRepoError):
        then = (
            "with the account this token belongs to; a fine-grained token also needs access to gated repositories"
            if has_token()
            else f"then {LOG_IN}"
        )
        return ModelError(
            "the repository is gated: its files are for those who were granted access",
            where=repository,
            remedy=f"accept its licence at {subject.page}, {then}",
        )
    if isinstance(error, errors.DisabledRepoError):
        return ModelError("the repository was disabled", where=repository, remedy=f"its page says why: {subject.page}")
    said = (error.response.headers.get("X-Error-Message") or "").lower()
    invalid = "invalid credentials" in said
    if isinstance(error, errors.RepositoryNotFoundError) and not invalid:
        access = "if it is private, use a token that may read it" if has_token() else f"if it is private, {LOG_IN}"
        return NotOnHubError(
            "there is no such repository on the Hub, or it is private",
            where=repository,
            remedy=f"check the name; {access}",
        )
    if "storage limit" in said:  # "Private repository storage limit reached, please upgrade your plan"
        remedy = "free some space of this account, write to a public repository, or have the limit raised"
        return full("this account's storage limit is reached", repository, remedy)
    return _denial(status_of(error), subject)


def _denial(status: int, subject: Subject) -> ModelError | None:
    """What an answer of 401 or 403 means; None for another."""
    repository = f"hf://{subject.name}"
    if status == 401 and not has_token():
        return ModelError("the Hub asks who this is", where=repository, remedy=LOG_IN)
    if status == 401:
        return ModelError(
            "the Hub does not accept the token that is set here",
            where=repository,
            remedy="it is mistyped, revoked or expired: `hf auth login` again, or correct or unset HF_TOKEN",
        )
    if status == 403:
        verb, access = ("write to", "write") if subject.is_written else ("read", "read")
        return ModelError(
            f"this login may not {verb} the repository",
            where=repository,
            remedy=f"give the token {access} access to its contents at https://huggingface.co/settings/tokens",
        )
    return None


def _unreachable(error: Exception, what: str, subject: Subject) -> StorageError:
    """No answer came, or not all of it."""
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    if isinstance(error, OfflineModeIsEnabled):
        return StorageError(
            f"{what}: it is not in the cache of this machine, and HF_HUB_OFFLINE is set",
            where=subject.uri,
            remedy="unset HF_HUB_OFFLINE, or fetch the model with `hf download` first",
            retryable=False,
        )
    if is_untrusted(error):
        return untrusted(what, subject.uri, "SSL_CERT_FILE")
    without = f"fetch the model elsewhere (hf download {subject.name}) and set HF_HUB_OFFLINE=1"
    return StorageError(
        f"{what}: {type(error).__name__}",
        where=f"hf://{subject.name}" if subject.is_written else subject.uri,  # not the branch that is ours
        remedy="check the network, the proxy settings and HF_ENDPOINT, and run again; where there is no network, "
        + ("write to a folder" if subject.is_written else without),
        retryable=is_transient(error),
    )


def _transport_faults() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    library: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__]
    return (library.TimeoutException, library.NetworkError, library.RemoteProtocolError, library.ProxyError)
