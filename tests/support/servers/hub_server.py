"""A server that speaks the Hub's HTTP API for repositories in memory, and fails as it is told to.

Large files are served by a second server on another port, to which the first redirects with signed addresses, as the
Hub does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import unquote, urlsplit

import pytest

from support.merging import command_environment
from support.servers.hub_http import Fault, Handler, Request, Server

TOKEN = "hf_sesame0pen"
"""A token that `HubServer` knows."""

PAGE = 100
"""Entries of a page of a repository's tree."""

_RESOLVE = re.compile(r"/(?P<name>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<name>(?:[^/]+/)?[^/]+?)(?P<rest>/(revision|tree)/.*)?")
_LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    """A repository: its files at each commit, and its branches.

    Attributes:
        readers: tokens that see it; None if it is public.
        granted: tokens that may read its files; None if it is not gated.
    """

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    granted: set[str] | None = None

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit of exactly these files; returns its id."""
        commit = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def head(self, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.branches[branch]]

    def find(self, revision: str) -> str | None:
        """The commit of a branch or a commit."""
        return self.branches.get(revision, revision if revision in self.commits else None)


def is_large(name: str, data: bytes) -> bool:
    """Whether a file is kept in the store."""
    return bool(data) and name.endswith(_LARGE)


def content_id(name: str, data: bytes) -> str:
    """SHA-256 of a large file, git blob id of a small one."""
    return hashlib.sha256(data).hexdigest() if is_large(name, data) else blob_id(data)


def blob_id(data: bytes) -> str:
    """What git calls a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """A context manager. ``faults`` (of the store: ``store_faults``) are used up one by one, one per request.

    Attributes:
        repos: by name.
        renamed: new names by old ones.
        tokens: those that are accepted.
        requests: in order.
        signatures: of addresses in the store that are good.
        hides_headers: leave out the headers that tell a file's content and size, as some mirrors do.
    """

    handlers: ClassVar[tuple[type[Handler], type[Handler]]]

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.tokens = {TOKEN}
        self.faults: deque[Fault] = deque()
        self.store_faults: deque[Fault] = deque()
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.signatures: set[str] = set()
        self.hides_headers = False
        self.lock = threading.RLock()
        self._servers = [Server(("127.0.0.1", 0), type("Handler", (kind,), {"owner": self})) for kind in self.handlers]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in self._servers
        ]

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def store(self) -> str:
        """The store's address."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(self, name: str, files: Mapping[str, bytes]) -> str:
        """Add a repository, or a commit to it; returns the commit's id."""
        with self.lock:
            return self.repos.setdefault(name, Repo(name)).commit(files)

    def sign(self, data: bytes) -> str:
        """An address of some content in the store."""
        signature = uuid.uuid4().hex
        with self.lock:
            self.signatures.add(signature)
            oid = hashlib.sha256(data).hexdigest()
            self.blobs[oid] = data
        return f"{self.store}/{oid}?Expires=1&Signature={signature}"

    def expire(self) -> None:
        """Let all signed addresses expire."""
        with self.lock:
            self.signatures.clear()

    def paths(self, host: str) -> list[str]:
        """Paths that one of the servers was asked for."""
        return [request.path for request in self.requests if request.host == host]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class StoreHandler(Handler):
    host = "store"

    def route(self, path: str) -> None:
        data = self.owner.blobs.get(path.strip("/"))
        if self.query.get("Signature") not in self.owner.signatures:
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        elif data is None:
            self.answer(404)
        else:
            self.send_range(data, {"ETag": '"not-what-the-hub-says"'})


class HubHandler(Handler):
    host = "hub"

    def route(self, path: str) -> None:
        resolve, api = _RESOLVE.fullmatch(path), _API.fullmatch(path)
        found = resolve or api
        if found is None:
            self.refuse(404)
            return
        name = self.owner.renamed.get(found["name"])
        if name is not None:
            location = self.path.replace(found["name"], name, 1)
            self.answer(307, b"", {"Location": location})
            return
        repo = self.repo(found["name"])
        if repo is None:
            return
        if resolve is not None:
            self._resolve(repo, unquote(resolve["revision"]), unquote(resolve["file"]))
        else:
            self._api(repo, found["rest"] or "")

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repo(self, name: str) -> Repo | None:
        """The repository, if the token sees it; else an error is answered."""
        if self.token and self.token not in self.owner.tokens:
            self.refuse(401, X_Error_Message="Invalid credentials in Authorization header")
            return None
        repo = self.owner.repos.get(name)
        if repo is None or (repo.readers is not None and self.token not in repo.readers):
            self.refuse(404 if self.token else 401, "RepoNotFound", X_Error_Message="Repository not found")
            return None
        return repo

    def commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return commit

    def _api(self, repo: Repo, rest: str) -> None:
        """``/api/models/org/name...``"""
        verb, _, revision = rest.strip("/").partition("/")
        if self.command != "GET" or verb not in ("", "revision", "tree"):
            self.refuse(404)
            return
        commit = self.commit(repo, unquote(revision) or "main")
        if commit is not None:
            (self._tree if verb == "tree" else self._describe)(repo, commit)

    def _describe(self, repo: Repo, commit: str) -> None:
        siblings = []
        for name, data in sorted(repo.commits[commit].items()):
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                entry |= {"size": len(data), "blobId": blob_id(data)}
                if is_large(name, data):
                    entry["lfs"] = {"size": len(data), "sha256": content_id(name, data), "pointerSize": 130}
            siblings.append(entry)
        self.send_json({"id": repo.name, "modelId": repo.name, "sha": commit, "siblings": siblings, "tags": []})

    def _tree(self, repo: Repo, commit: str) -> None:
        entries = list(_tree_entries(repo.commits[commit]))
        first = int(self.query.get("cursor", 0))
        headers = {}
        if first + PAGE < len(entries):
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.owner.endpoint}{path}?recursive=True&cursor={first + PAGE}>; rel="next"'
        self.send_json(entries[first : first + PAGE], headers=headers)

    def _resolve(self, repo: Repo, revision: str, name: str) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return
        if repo.granted is not None and self.token not in repo.granted:
            self.refuse(403 if self.token else 401, "GatedRepo", X_Error_Message="Access to it is restricted.")
            return
        data = repo.commits[commit].get(name)
        if data is None:
            self.refuse(404, "EntryNotFound", X_Error_Message="Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if is_large(name, data):
            if not self.owner.hides_headers:
                headers |= {"X-Linked-ETag": f'"{content_id(name, data)}"', "X-Linked-Size": str(len(data))}
            self.answer(302, b"", {**headers, "Location": self.owner.sign(data)})
            return
        if not self.owner.hides_headers:
            headers["ETag"] = f'W/"{blob_id(data)}"'
        self.send_range(data, headers)


S = TypeVar("S", bound=HubServer)

HubServer.handlers = (HubHandler, StoreHandler)


def _tree_entries(files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    folders = sorted({name.rpartition("/")[0] for name in files} - {""})
    for folder in folders:
        yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
    for name, data in sorted(files.items()):
        entry: dict[str, Any] = {"type": "file", "oid": blob_id(data), "size": len(data), "path": name}
        if is_large(name, data):
            entry["lfs"] = {"oid": content_id(name, data), "size": len(data), "pointerSize": 130}
        yield entry


@contextlib.contextmanager
def serving(server: S, monkeypatch: pytest.MonkeyPatch, home: Path, *, token: str | None = None) -> Iterator[S]:
    """Run a server that this process's huggingface_hub takes for the only Hub."""
    import huggingface_hub

    with server:
        point_at(monkeypatch, server, home, token=token)
        yield server
    huggingface_hub.close_session()


def point_at(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path, *, token: str | None = None) -> None:
    """Let huggingface_hub in this process know no Hub but the server, no cache but ``home`` and no token but this."""
    import huggingface_hub
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.close_session()


def environment(server: HubServer, home: Path, *, token: str | None = None) -> dict[str, str]:
    """The whole environment of a process of its own for which it is the same."""
    plain = command_environment()
    return {
        **{name: value for name, value in plain.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **({} if token is None else {"HF_TOKEN": token}),
    }
