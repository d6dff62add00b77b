"""An HTTP server that answers like S3 for one bucket in memory, and fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[["_Handler"], bool]
"""Acts on a request; returns whether the request is still to be answered as if nothing had happened."""


def status(code: int, name: str, **headers: str) -> Fault:
    """Answer with an error."""

    def act(handler: _Handler) -> bool:
        handler.drain()
        handler.answer(code, f"<Error><Code>{name}</Code><Message>m</Message></Error>".encode(), headers)
        return False

    return act


def break_after(num_bytes: int) -> Fault:
    """Close the connection after that many bytes of the body."""

    def act(handler: _Handler) -> bool:
        handler.break_after = num_bytes
        return True

    return act


def reset(handler: _Handler) -> bool:
    """Close the connection without an answer."""
    handler.drain()
    handler.close_connection = True
    return False


def lose_answer(handler: _Handler) -> bool:
    """Do what is asked, then close the connection without an answer."""
    handler.break_after = -1
    return True


def stall(seconds: float) -> Fault:
    """Answer only after a while."""

    def act(handler: _Handler) -> bool:
        time.sleep(seconds)
        return True

    return act


class FaultyS3:
    """A context manager. ``faults`` are used up one by one, one per request; ``requests`` notes what came.

    Attributes:
        objects: content by key.
        uploads: parts of unfinished multipart uploads, by id.
        requests: (method, query and range) of each request, in order.
    """

    def __init__(self, *faults: Fault) -> None:
        self.faults = deque(faults)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def client(self) -> Any:
        """A boto3 client without retries of its own and with short timeouts."""
        import boto3
        from botocore.config import Config

        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            read_timeout=0.5,
            connect_timeout=0.5,
            s3={"addressing_style": "path"},
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
        )
        port = self._server.server_address[1]
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
            config=config,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyS3
    protocol_version = "HTTP/1.1"
    break_after: int | None = None

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        self.break_after = None
        self.drained = b""
        super().handle_one_request()

    def drain(self) -> bytes:
        """Read the request's body."""
        self.drained = self.drained or self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.drained

    def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send an answer, or as much of it as the fault lets through."""
        if self.break_after == -1:
            self.close_connection = True
            return
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.break_after is not None and self.command == "GET":
            self.close_connection = True
            body = body[: self.break_after]
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.key = unquote(url.path).partition("/")[2].partition("/")[2]
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.owner.lock:
            self.owner.requests.append((self.command, self.headers.get("Range") or "&".join(self.query)))
            fault = self.owner.faults.popleft() if self.owner.faults else None
        if fault is None or fault(self):
            getattr(self, f"_{self.command.lower()}")()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - the names http.server looks for

    def _get(self) -> None:
        content = self.owner.objects.get(self.key)
        if content is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.answer(206, part, {"Content-Range": span, "ETag": '"etag"'})

    def _head(self) -> None:
        content = self.owner.objects.get(self.key)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", '"etag"')
        self.end_headers()

    def _put(self) -> None:
        body = self.drain()
        with self.owner.lock:
            if "uploadId" in self.query:
                self.owner.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = body
            elif self.headers.get("If-None-Match") == "*" and self.key in self.owner.objects:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            else:
                self.owner.objects[self.key] = body
        self.answer(200, b"", {"ETag": '"etag"'})

    def _post(self) -> None:
        self.drain()
        if "uploads" in self.query:
            with self.owner.lock:
                name = f"upload{len(self.owner.uploads)}"
                self.owner.uploads[name] = {}
            result = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            self.answer(200, result.encode())
            return
        with self.owner.lock:
            parts = self.owner.uploads.pop(self.query["uploadId"], None)
            if parts is not None:
                self.owner.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
        if parts is None:
            self.answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        else:
            result = "<CompleteMultipartUploadResult><ETag>etag</ETag></CompleteMultipartUploadResult>"
            self.answer(200, result.encode())

    def _delete(self) -> None:
        with self.owner.lock:
            self.owner.uploads.pop(self.query["uploadId"], None)
        self.answer(204)
