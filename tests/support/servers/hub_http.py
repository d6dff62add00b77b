"""HTTP servers for tests that answer as they are told to: what a server of the Hub's API is built on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[["Handler"], bool]
"""Acts on a request; returns whether the request is still to be answered as if nothing had happened."""


def refuse(code: int, error: str = "", **headers: str) -> Fault:
    """Answer with an error."""

    def act(handler: Handler) -> bool:
        handler.refuse(code, error, **headers)
        return False

    return act


def break_after(num_bytes: int) -> Fault:
    """Close the connection after that many bytes of the body."""

    def act(handler: Handler) -> bool:
        handler.break_after = num_bytes
        return True

    return act


def reset(handler: Handler) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    return False


def pass_by(handler: Handler) -> bool:
    """Answer this one."""
    del handler
    return True


def whole_files(handler: Handler) -> bool:
    """Ignore the range that is asked for."""
    del handler.headers["Range"]
    return True


@dataclass(frozen=True)
class Request:
    """What came: the server ("hub" or "store"), method, path without query, range, and the Authorization header."""

    host: str
    method: str
    path: str
    span: str
    authorization: str


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # or clients that come together are kept waiting for a second


class Handler(BaseHTTPRequestHandler):
    owner: Any
    host: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the other side's delayed acknowledgement
    break_after: int | None = None

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def answer(self, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send an answer, or as much of it as the fault lets through."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.break_after is not None:
            self.close_connection = True
            body = body[: self.break_after]
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, data: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(code, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, code: int, error: str = "", **headers: str) -> None:
        """An error as the Hub answers it; underscores of header names become dashes."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if error:
            sent["X-Error-Code"] = error
        self.body()
        self.send_json({"error": error or "an error"}, code, sent)

    def body(self) -> bytes:
        """The request's body."""
        if not hasattr(self, "_body"):
            self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self._body

    def send_range(self, data: bytes, headers: Mapping[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self.answer(200, data, headers)
        elif int(span[1]) >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            part = data[int(span[1]) : int(span[2]) + 1]
            said = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}"
            self.answer(206, part, {**headers, "Content-Range": said})

    def handle_one_request(self) -> None:
        self.break_after = None
        if hasattr(self, "_body"):
            del self._body
        super().handle_one_request()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        faults = self.owner.faults if self.host == "hub" else self.owner.store_faults
        with self.owner.lock:
            self.owner.requests.append(
                Request(
                    self.host,
                    self.command,
                    unquote(url.path),
                    self.headers.get("Range", "").removeprefix("bytes="),
                    self.headers.get("Authorization", ""),
                )
            )
            fault = faults.popleft() if faults else None
        if fault is None or fault(self):
            self.route(url.path)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the names http.server looks for

    def route(self, path: str) -> None:
        raise NotImplementedError
