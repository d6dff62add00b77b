"""The part of the Hub's HTTP API by which repositories are written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from support.servers.hub_server import HubHandler, HubServer, Repo, StoreHandler, blob_id, content_id, is_large

CHUNK_BYTES = 100_000
"""Larger files are uploaded in parts of this size."""

_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch|paths-info)/(?P<revision>[^/]+)")
_BATCH = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_COMPLETE = re.compile(r"/complete/(?P<upload>[0-9a-f]+)")


class WritableHubServer(HubServer):
    """Attributes beyond those of `HubServer`.

    Attributes:
        uploads: unfinished ones, by id: (content's id, parts by number).
        writers: tokens that may write.
        private: names of repositories that were created as private ones.
        messages: of all commits, with their branches.
        first_files: what is in a repository that was just created.
    """

    handlers: ClassVar[Any] = ()

    def __init__(self) -> None:
        super().__init__()
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.writers = set(self.tokens)
        self.private: set[str] = set()
        self.messages: list[tuple[str, str]] = []
        self.first_files = {".gitattributes": b"*.safetensors filter=lfs\n"}


class _WritingHandler(HubHandler):
    owner: WritableHubServer

    def route(self, path: str) -> None:
        api, batch, complete = _API.fullmatch(path), _BATCH.fullmatch(path), _COMPLETE.fullmatch(path)
        if path == "/api/repos/create":
            self._create(json.loads(self.body()))
        elif path == "/api/validate-yaml":
            self.body()
            self.send_json({"warnings": [], "errors": []})
        elif complete is not None:
            self._complete(complete["upload"])
        elif batch is not None or api is not None:
            found = batch or api
            assert found is not None
            self.body()
            repo = self.repo(found["name"])
            if repo is None:
                return
            if self.token not in self.owner.writers:
                self.refuse(403, X_Error_Message="You don't have the rights to write here")
            elif api is None:
                self._batch()
            else:
                with self.owner.lock:
                    getattr(self, f"_{api['verb'].replace('-', '_')}")(repo, unquote(api["revision"]))
        else:
            super().route(path)

    def _create(self, data: dict[str, Any]) -> None:
        name = f"{data['organization']}/{data['name']}"
        if self.token not in self.owner.writers:
            self.refuse(403 if self.token else 401, X_Error_Message="You don't have the rights to create it")
            return
        with self.owner.lock:
            if name in self.owner.repos:
                self.send_json({"error": "You already created this model repo", "url": self._url(name)}, 409)
                return
            self.owner.add(name, self.owner.first_files)
            if data.get("private") or data.get("visibility") == "private":
                self.owner.repos[name].readers = {self.token}
                self.owner.private.add(name)
        self.send_json({"url": self._url(name)})

    def _url(self, name: str) -> str:
        return f"{self.owner.endpoint}/{name}"

    def _branch(self, repo: Repo, branch: str) -> None:
        if self.command == "POST" and branch in repo.branches:
            self.refuse(409)
        elif self.command == "POST":
            repo.branches[branch] = repo.branches[json.loads(self.body()).get("startingPoint", "main")]
            self.send_json({})
        elif repo.branches.pop(branch, None) is None:
            self.refuse(404)
        else:
            self.send_json({})

    def _preupload(self, repo: Repo, revision: str) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return
        answer = []
        for file in json.loads(self.body())["files"]:
            name, size = file["path"], file["size"]
            there = repo.commits[commit].get(name)
            entry: dict[str, Any] = {"path": name, "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_large(name, b"x" * min(size, 1)) else "regular"
            if there is not None:
                entry["oid"] = content_id(name, there)
            answer.append(entry)
        self.send_json({"files": answer})

    def _paths_info(self, repo: Repo, revision: str) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return
        answer = []
        for name in parse_qs(self.body().decode())["paths"]:
            data = repo.commits[commit].get(name)
            if data is None:
                continue
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if is_large(name, data):
                entry["lfs"] = {"oid": content_id(name, data), "size": len(data), "pointerSize": 130}
            answer.append(entry)
        self.send_json(answer)

    def _batch(self) -> None:
        objects = []
        for wanted in json.loads(self.body())["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            with self.owner.lock:
                if oid not in self.owner.blobs:
                    upload, signature = uuid.uuid4().hex, uuid.uuid4().hex
                    self.owner.uploads[upload] = (oid, {})
                    self.owner.signatures.add(signature)
                    href = f"{self.owner.store}/{upload}/{{}}?Signature={signature}"
                    action: dict[str, Any] = {"href": href.format(1)}
                    if size > CHUNK_BYTES:
                        parts = range(1, -(-size // CHUNK_BYTES) + 1)
                        header = {str(number): href.format(number) for number in parts}
                        complete = f"{self.owner.endpoint}/complete/{upload}"
                        action = {"href": complete, "header": {"chunk_size": str(CHUNK_BYTES), **header}}
                    answer["actions"] = {"upload": action}
            objects.append(answer)
        self.send_json({"transfer": "multipart", "objects": objects})

    def _complete(self, upload: str) -> None:
        named = [part["partNumber"] for part in json.loads(self.body())["parts"]]
        with self.owner.lock:
            oid, parts = self.owner.uploads.pop(upload)
            data = b"".join(parts[number] for number in named)
            assert hashlib.sha256(data).hexdigest() == oid
            self.owner.blobs[oid] = data
        self.send_json({})

    def _commit(self, repo: Repo, branch: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = lines[0]["value"]
        if branch not in repo.branches:
            self.refuse(404, "RevisionNotFound")
            return
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            self.refuse(412, X_Error_Message="A commit has happened since. Please refresh and try again.")
            return
        files = dict(repo.head(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.owner.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        self.owner.messages.append((branch, header["summary"]))
        commit = repo.commit(files, branch)
        self.send_json({"commitUrl": f"{self._url(repo.name)}/commit/{commit}", "commitOid": commit})


class _WritingStoreHandler(StoreHandler):
    owner: WritableHubServer

    def route(self, path: str) -> None:
        if self.command != "PUT":
            super().route(path)
            return
        data = self.body()
        _, upload, number = path.split("/")
        if parse_qs(urlsplit(self.path).query)["Signature"][0] not in self.owner.signatures:
            self.answer(403)
            return
        with self.owner.lock:
            oid, parts = self.owner.uploads[upload]
            parts[int(number)] = data
            if hashlib.sha256(data).hexdigest() == oid:
                self.owner.blobs[oid] = data
                del self.owner.uploads[upload]
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


WritableHubServer.handlers = (_WritingHandler, _WritingStoreHandler)
