"""A proxy between an S3 client and a real server, which fails by a seeded schedule.

Requests are passed on as they came, so that signatures hold; whatever goes wrong is drawn for each request from the
schedule's own random numbers.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

_BLOCK_BYTES = 64 << 10


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as drawn</Message></Error>".encode()


@dataclass(frozen=True)
class Schedule:
    """What goes wrong, and how often.

    Attributes:
        seed: of all draws.
        rates: probability of each fault for a request, by its name in `FAULTS`.
        max_in_a_row: faults of one request after which it goes through, so that all pass in the end.
        expires_after: requests after which credentials are told to have expired; None for never.
    """

    seed: int
    rates: Mapping[str, float]
    max_in_a_row: int = 2
    expires_after: int | None = None


class HostileProxy:
    """Listens on a free port of the loopback device, for the server at ``upstream`` (an ``http://`` URL).

    Attributes:
        counts: faults that were made, by name.
        sent_bytes: of the bodies of answers to GET, by path.
    """

    def __init__(self, upstream: str, schedule: Schedule) -> None:
        split = urlsplit(upstream)
        assert split.hostname is not None
        self.upstream = (split.hostname, split.port or 80)
        self.schedule = schedule
        self.counts: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._random = random.Random(schedule.seed)
        self._in_a_row: Counter[str] = Counter()
        self._num_requests = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint_url(self) -> str:
        """What ``AWS_ENDPOINT_URL`` must be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, request: str) -> str | None:
        """What goes wrong with a request, which is named the same when it is tried again; None for nothing."""
        with self._lock:
            self._num_requests += 1
            limit = self.schedule.expires_after
            if limit is not None and self._num_requests > limit:
                self.counts["expired"] += 1
                return "expired"
            found = None
            point = self._random.random()
            for name, rate in self.schedule.rates.items():
                point -= rate
                if point < 0:
                    found = name
                    break
            if found is None or self._in_a_row[request] >= self.schedule.max_in_a_row:
                self._in_a_row[request] = 0
                return None
            self._in_a_row[request] += 1
            self.counts[found] += 1
            return found

    def number(self, below: int) -> int:
        """A number of the schedule, from 0 to ``below - 1``."""
        with self._lock:
            return self._random.randrange(max(1, below))


class _Server(ThreadingHTTPServer):
    """Clients that go away are not news."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: HostileProxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        name = self.owner.draw(f"{self.command} {self.path} {self.headers.get('Range')}")
        if name is None:
            self._pass_on(body)
        else:
            FAULTS[name](self, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - as the standard library calls them

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        """An answer of our own."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/xml", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def ask(self, body: bytes) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        """The server's answer to the request with this body."""
        connection = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                connection.putheader(name, value)
        connection.endheaders(body or None)
        return connection.getresponse(), connection

    def _pass_on(self, body: bytes, *, cut: Callable[[int], int] | None = None, pause: float = 0.0) -> None:
        """What the server answers; of its body only so many bytes, after a pause in the middle."""
        response, connection = self.ask(body)
        with contextlib.closing(connection):
            data = response.read()
            self.send_response_only(response.status, response.reason)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "GET":
                with self.owner._lock:
                    self.owner.sent_bytes[urlsplit(self.path).path] += len(data)
            half = len(data) // 2
            self.wfile.write(data[:half])
            if pause:
                self.wfile.flush()
                time.sleep(pause)
            kept = len(data) if cut is None else cut(len(data))
            self.wfile.write(data[half : max(half, kept)])
            if cut is not None:
                self.hang_up()

    def hang_up(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.wfile.flush()
        # Lingering for no time makes the kernel send a reset instead of an end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _lose_answer(handler: _Handler, body: bytes) -> None:
    """The server does it, and nobody hears of it."""
    response, connection = handler.ask(body)
    with contextlib.closing(connection):
        response.read()
    handler.hang_up()


def _wrong_body(handler: _Handler, body: bytes) -> None:
    """A bit of what is sent flips on the way."""
    if body:
        at = handler.owner.number(len(body))
        body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    handler._pass_on(body)


FAULTS: Mapping[str, Callable[[_Handler, bytes], None]] = {
    "error 500": lambda handler, body: handler.answer(500, _error("InternalError")),
    "error 503": lambda handler, body: handler.answer(503, _error("SlowDown")),
    "error 429": lambda handler, body: handler.answer(429, _error("TooManyRequests"), Retry_After="0"),
    "reset": lambda handler, body: handler.hang_up(),
    "lost answer": _lose_answer,
    "short body": lambda handler, body: handler._pass_on(body, cut=handler.owner.number),
    "slow": lambda handler, body: handler._pass_on(body, pause=0.05),
    "wrong body": _wrong_body,
    "expired": lambda handler, body: handler.answer(400, _error("ExpiredToken")),
    "denied": lambda handler, body: handler.answer(403, _error("AccessDenied")),
}
"""What can go wrong with a request, by name."""

TRANSIENT = ("error 500", "error 503", "error 429", "reset", "lost answer", "short body", "slow", "wrong body")
"""What retrying fixes."""
