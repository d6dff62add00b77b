"""Credentials are hidden in whatever is shown or written: errors, logs, plans, manifests, model cards.

Hidden are user and password of a URL, signatures in its query, tokens of the Hugging Face Hub, values of authorisation
headers, and the values of the environment's variables that hold credentials.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import unquote

HIDDEN: Final = "…"

_T = TypeVar("_T")

# What follows a colon is a port if it is a number, else a password, whose `@` a message may have cut off. `gpt2@main`
# on the Hub is a revision. Passwords may hold slashes, as AWS's secret keys do.
_USER: Final = re.compile(
    r"(?<![\w+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?:(?!(?<=hf://)[^\s/:@]*@)[^\s/]*@|[^\s/:@\[]+:(?!\d+/)[^\s@]*@|[^\s/:@\[]+:[^\s/\d@][^\s/]*)"
)
_USER_AT_PORT: Final = re.compile(r"(?<![\w.~%+-])[^\s:/@'\"=(]+:[^\s/@]+@(?=[\w.\[\]:-]+:\d)")
_QUERY: Final = re.compile(
    r"(?i)(?P<name>[?&;][\w.-]*(?:sig|signature|token|secret|passw|credential|policy|auth|key)[\w.-]*=)"
    r"[^&\s\"'<>]*[^&\s\"'<>:,.;)]"
)
_HUB_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_HEADER: Final = re.compile(r"(?i)(?P<name>\bbearer\s+|authorization\W{1,6}(?:\w+\s+)?)[\w.~+/=-]{12,}")

_TOKENS: Final = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"),
)
_ADDRESSES: Final = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT", "RAY_ADDRESS"),
)
_MIN_CHARACTERS: Final = 8
"""Of a value that is hidden wherever it stands: shorter ones are parts of ordinary words."""


def redact(text: str) -> str:
    """The text, with `HIDDEN` for each credential."""
    return _hider()(text)


def redact_data(data: _T) -> _T:
    """Plain JSON data, or any nesting of mappings, lists and tuples, with all text redacted, keys too."""
    hide = _hider()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return hide(value)
        if isinstance(value, Mapping):
            return {walk(key): walk(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(walk, value))
        return value

    found: _T = walk(data)
    return found


def holds_credential(uri: str) -> bool:
    """Whether a URI, or an address such as ``user:password@host:80``, holds a credential by its form."""
    return _hide_by_form(uri) != uri


class RedactedStream:
    """A text stream that hides credentials in what is written to it.

    Args:
        stream: where it goes; all but writing is left to it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`. A credential must not be split over two calls."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """See `io.IOBase.writelines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _hide_by_form(text: str) -> str:
    if "://" in text:
        text = _USER.sub(lambda match: match["scheme"] + "://" + HIDDEN + "@" * match[0].endswith("@"), text)
    if "@" in text:
        text = _USER_AT_PORT.sub(HIDDEN + "@", text)
    if "=" in text:
        text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    return _HEADER.sub(rf"\g<name>{HIDDEN}", _HUB_TOKEN.sub(HIDDEN, text))


def _hider() -> Callable[[str], str]:
    """A function that hides credentials, including those in the present environment."""
    found = {value for name in _TOKENS if (value := os.environ.get(name, "").strip())}
    for name in _ADDRESSES:
        user, at, _ = os.environ.get(name, "").partition("://")[2].rpartition("@")
        if at:
            password = user.partition(":")[2] or user
            found |= {password, unquote(password)}
    found = {value for value in found if len(value) >= _MIN_CHARACTERS}
    found |= {json.dumps(value)[1:-1] for value in found}  # as written in JSON
    if not found:
        return _hide_by_form
    values = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))
    return lambda text: values.sub(HIDDEN, _hide_by_form(text))
