"""Requests to the Hub and to the stores behind it: who they say they are, and how long they wait."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.version import __version__
from mergekit_ray.storage.hub.faults import LOG_IN

T = TypeVar("T")

logger = logging.getLogger(__name__)

API_SECONDS: Final = 30.0
"""How long an answer about a repository may take."""

_CONNECT_SECONDS: Final = 10.0
_READ_SECONDS: Final = 60.0
_MAX_CLOSED_SECONDS: Final = 900.0
_DEFAULT_CLOSED_SECONDS: Final = 5.0
_SPREAD: Final = 0.1
_LIBRARY: Final = "mergekit-ray"


class Gate:
    """Holds back all threads' requests to one host while it wants to be left alone.

    A pause is waited for once, however many threads met it.

    Args:
        clock: seconds that only grow.
        sleep: waits that long.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._opens_at = 0.0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Wait until requests may be sent. Threads leave at slightly different times, lest all are refused again."""
        while (seconds := self._opens_at - self._clock()) > 0:
            self._sleep(seconds + random.uniform(0.0, _SPREAD * seconds))

    def close_for(self, seconds: float) -> bool:
        """Let no request pass for so long; returns whether that is longer than was known."""
        with self._lock:
            opens_at = self._clock() + min(seconds, _MAX_CLOSED_SECONDS)
            later, self._opens_at = opens_at > self._opens_at + 1.0, max(opens_at, self._opens_at)
        return later


_GATES: dict[str, Gate] = {}
_GATES_LOCK = threading.Lock()


def gate_of(url: str) -> Gate:
    """The gate of this process to a URL's host."""
    with _GATES_LOCK:
        return _GATES.setdefault(urlsplit(url).netloc, Gate())


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or the public one."""
    from huggingface_hub import constants  # noqa: PLC0415

    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants  # noqa: PLC0415

    return constants.HF_HUB_OFFLINE


def is_hub(url: str) -> bool:
    """Whether a URL is the Hub's own, where tokens may be sent; scheme, host and port must agree."""
    return urlsplit(url)[:2] == urlsplit(endpoint())[:2]


def ask(call: Callable[[Any], T]) -> T:
    """Ask the Hub something through huggingface_hub's `HfApi`, which is given to ``call``. One request, one attempt."""
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    _headers(authorized=True)  # refuses what must not be quoted, as the library would
    gate = gate_of(endpoint())
    gate.enter()
    try:
        return call(HfApi(endpoint=endpoint(), library_name=_LIBRARY, library_version=__version__))
    except HfHubHTTPError as error:
        if error.response.status_code == 429:
            _close(gate, error.response.headers)
        raise


@contextlib.contextmanager
def stream(url: str, start: int, end: int) -> Iterator[Any]:
    """The answer of huggingface_hub's session to a GET of bytes ``[start, end)``; its body is yet to be read.

    The user's token goes to the Hub only: neither to another host named by ``url``, nor along a redirect to one.
    """
    # We avoid `http_stream_backoff`: it logs the address, which may be a credential, and each thread waits on its own.
    from huggingface_hub.utils import get_session  # noqa: PLC0415

    gate = gate_of(url)
    gate.enter()
    headers = _headers(authorized=is_hub(url))
    # Compressed, the bytes would not be those of the range.
    headers |= {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
    timeout = (_CONNECT_SECONDS, _READ_SECONDS, _READ_SECONDS, None)  # connect, read, write; a free connection
    session = get_session()
    try:
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code == 429:
                _close(gate, response.headers)
            yield response
    except RuntimeError as error:
        if session.is_closed:  # by huggingface_hub, in another thread
            raise ConnectionResetError("the session was closed") from error
        raise


def _headers(*, authorized: bool) -> dict[str, str]:
    """Who asks, with the token of huggingface_hub's chain or without.

    Raises:
        ModelError: what is set as the token cannot be one.
    """
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    headers: dict[str, str] = build_hf_headers(
        token=None if authorized else False, library_name=_LIBRARY, library_version=__version__
    )
    value = headers.get("authorization", "")
    if not (value.isascii() and value.isprintable()):
        # The HTTP library would refuse it too, and quote it.
        raise ModelError(
            "what is set as the token of the Hub holds characters that no token has",
            where="HF_TOKEN",
            remedy=f"copy it again from https://huggingface.co/settings/tokens and {LOG_IN}",
        )
    return headers


def _close(gate: Gate, headers: Any) -> None:
    """Close the gate for as long as an answer of 429 says."""
    seconds = asked_seconds(headers)
    if gate.close_for(seconds):
        logger.warning("the Hub's rate limit is reached; going on in %.0f seconds", seconds)


def asked_seconds(headers: Any) -> float:
    """Seconds a server wants to be left alone, by ``Retry-After`` or the Hub's ``RateLimit``; a few if it does not say.

    Source: https://huggingface.co/docs/hub/rate-limits.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # noqa: PLC0415

    asked = (headers.get("retry-after") or "").strip()
    if asked.isdigit():
        return float(asked)
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return _DEFAULT_CLOSED_SECONDS
