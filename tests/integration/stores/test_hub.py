"""Reading repositories of the Hub through huggingface_hub, against a server that speaks its API."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.storage import open_source
from mergekit_ray.storage.hub import source as hub
from mergekit_ray.storage.hub.source import HubSource
from mergekit_ray.storage.names import check_name
from mergekit_ray.storage.protocols import FileStat, MappableSource, Sink
from mergekit_ray.storage.transfers import RetryPolicy
from support.servers.hub_http import refuse
from support.servers.hub_server import TOKEN, HubServer, content_id, environment, point_at, serving
from support.store_conformance import StoreConformance, fetch

QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)
DATA = random.Random(3).randbytes(200_000)
CONFIG = b'{"a": 1}'
BUSY = refuse(503)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, which this process's huggingface_hub takes for the only one, with a public repository."""
    monkeypatch.setattr(hub, "RetryPolicy", lambda: QUICK)
    monkeypatch.setattr(hub, "LOOK_UP", QUICK)
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:
        server.add("org/name", {"config.json": CONFIG, "model.safetensors": DATA})
        yield server


def opened(reference: str = "org/name") -> HubSource:
    source = open_source(reference)
    assert isinstance(source, HubSource)
    return source


def pinned(server: HubServer, name: str = "org/name") -> str:
    """The repository at its commit, which a worker opens."""
    return f"hf://{name}@{server.repos[name].branches['main']}"


class Committed:
    """Files that are written as commits on the server and read by what the product opens there."""

    def __init__(self, server: HubServer, *, is_pinned: bool) -> None:
        self._server = server
        self._is_pinned = is_pinned
        self._lock = threading.Lock()
        self._change(lambda files: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def put(self, name: str, data: bytes) -> FileStat:
        check_name(name, "here")
        self._change(lambda files: files.update({name: data}))
        return FileStat(name, len(data), f"{content_id(name, data)}-{len(data)}")

    def open(self, name: str, num_bytes: int) -> Any:
        check_name(name, "here")
        store, written = self, bytearray()

        class Upload:
            write = staticmethod(written.extend)
            commit = staticmethod(lambda: store.put(name, bytes(written)))

        return Upload

    def put_if_absent(self, name: str, data: bytes) -> None:
        self.put(name, data)

    def delete(self, names: list[str]) -> None:
        for name in names:
            check_name(name, "here")
        self._change(lambda files: [files.pop(name, None) for name in names])

    def _change(self, change: Callable[[dict[str, bytes]], object]) -> None:
        with self._lock:
            repo = self._server.repos.get("org/store")
            files = dict(repo.head()) if repo else {}
            change(files)
            self._server.add("org/store", files)
            self._source = opened(pinned(self._server, "org/store") if self._is_pinned else "org/store")


class TestHubSource(StoreConformance):
    """What is about writing is left out: it would test the server."""

    @pytest.fixture(params=["resolved", "pinned"])
    def store(self, server: HubServer, request: pytest.FixtureRequest) -> Any:
        return Committed(server, is_pinned=request.param == "pinned")

    test_implements_the_protocol = None
    test_an_upload_may_come_in_pieces_from_a_reused_buffer = None
    test_nothing_is_seen_before_commit = None
    test_abort_leaves_nothing = None
    test_abort_after_commit_does_nothing = None
    test_too_few_bytes_are_not_committed = None
    test_too_many_bytes_are_refused = None
    test_put_if_absent = None
    test_of_racers_exactly_one_wins = None


def test_it_is_a_source_that_is_not_written_to_or_mapped() -> None:
    source = opened()
    assert not isinstance(source, Sink | MappableSource)


# What is asked of the Hub


def test_opening_takes_one_request_and_pins_the_commit(server: HubServer) -> None:
    source = opened()
    commit = server.repos["org/name"].branches["main"]
    assert source.uri == f"hf://org/name@{commit}"
    assert [file.name for file in source.list()] == ["config.json", "model.safetensors"]
    assert server.paths("hub") == ["/api/models/org/name"]
    server.add("org/name", {"config.json": b"newer"})
    assert source.read("config.json", max_bytes=100) == CONFIG
    assert open_source("org/name").read("config.json", max_bytes=100) == b"newer"


def test_opening_a_commit_asks_nothing(server: HubServer) -> None:
    source = opened(pinned(server))
    assert server.requests == []
    assert fetch(source, "model.safetensors", [(0, 10)]) == [DATA[:10]]
    assert len(server.requests) == 2


def test_nodes_agree_on_versions_whether_they_have_the_list_or_not(server: HubServer) -> None:
    listed, unlisted = opened(), opened(pinned(server))
    for name, content in (("config.json", CONFIG), ("model.safetensors", DATA)):
        stat = listed.stat(name)
        assert (
            stat == unlisted.stat(name) == FileStat(name, len(content), f"{content_id(name, content)}-{len(content)}")
        )
        assert listed.read_head(name, 5) == unlisted.read_head(name, 5) == (content[:5], stat)


def test_a_mirror_that_hides_the_headers_is_asked_for_the_list(server: HubServer) -> None:
    server.hides_headers = True
    source = opened(pinned(server))
    assert source.read_head("model.safetensors", 5)[1].version.startswith(content_id("model.safetensors", DATA))
    with pytest.raises(CheckpointError, match="no such file"):
        source.read("other", max_bytes=1)


def test_branches_are_opened(server: HubServer) -> None:
    server.repos["org/name"].commit({"config.json": b"tuned"}, branch="feature/x")
    for source in (open_source("org/name", "feature/x"), open_source("hf://org/name@feature/x")):
        assert source.read("config.json", max_bytes=10) == b"tuned"


def test_repositories_of_many_files_are_listed_page_by_page(server: HubServer) -> None:
    names = sorted(f"part/{number:04}.safetensors" for number in range(1005))
    commit = server.add("org/many", dict.fromkeys(names, b"x"))
    for reference in ("org/many", f"hf://org/many@{commit}"):
        source = opened(reference)
        assert [file.name for file in source.list()] == names
        assert source.list()[0] == opened(reference).read_head(names[0], 1)[1]


def test_a_renamed_repository_is_followed(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    server.renamed["org/old"] = "org/name"
    source = opened("org/old")
    assert source.uri == pinned(server)
    assert "hf://org/old is now called hf://org/name" in caplog.text
    commit = server.repos["org/name"].branches["main"]
    assert fetch(opened(f"hf://org/old@{commit}"), "model.safetensors", [(5, 9)]) == [DATA[5:9]]


# Tokens


def test_the_token_goes_to_the_hub_and_not_to_the_store(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, server, tmp_path, token=TOKEN)
    server.repos["org/name"].readers = {TOKEN}
    source = opened()
    assert fetch(source, "model.safetensors", [(0, 100)]) == [DATA[:100]]
    assert source.read("config.json", max_bytes=10) == CONFIG
    assert {(request.host, request.authorization) for request in server.requests} == {
        ("hub", f"Bearer {TOKEN}"),
        ("store", ""),
    }


def test_the_token_does_not_follow_a_redirect_of_a_small_file(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, server, tmp_path, token=TOKEN)
    source = opened()
    location = server.sign(CONFIG)

    def redirect(handler: Any) -> bool:
        handler.answer(302, b"", {"Location": location})
        return False

    server.faults.append(redirect)
    assert source.read("config.json", max_bytes=10) == CONFIG
    assert [request.authorization for request in server.requests if request.host == "store"] == [""]


def test_the_stored_login_is_used(server: HubServer, tmp_path: Path) -> None:
    server.repos["org/name"].readers = {TOKEN}
    with pytest.raises(ModelError):
        opened()
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(f"{TOKEN}\n")
    assert opened().read("config.json", max_bytes=10) == CONFIG


def refused(action: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        action()
    assert TOKEN not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("token", "advice"), [(None, "hf auth login"), (TOKEN, "a token that may read it")])
def test_a_missing_or_private_repository(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, advice: str
) -> None:
    point_at(monkeypatch, server, tmp_path, token=token)
    server.repos["org/name"].readers = {"another"}
    for reference in ("org/name", "org/nobody", "hf://org/nobody"):
        error = refused(lambda reference=reference: opened(reference))
        assert "no such repository on the Hub, or it is private" in str(error)
        assert advice in str(error)
        assert error.where == f"hf://{reference.removeprefix('hf://')}"
    error = refused(lambda: opened(pinned(server)).list())
    assert error.where == "hf://org/name"


def test_a_gated_repository_without_a_login(server: HubServer) -> None:
    server.repos["org/name"].granted = {TOKEN}
    error = refused(lambda: opened().read("config.json", max_bytes=10))
    assert error.where == "hf://org/name"
    assert error.remedy is not None
    assert f"accept its licence at {server.endpoint}/org/name, then log in with `hf auth login`" in error.remedy
    refused(lambda: fetch(opened(), "model.safetensors", [(0, 1)]))


def test_a_gated_repository_and_a_login_that_was_not_granted(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, server, tmp_path, token=TOKEN)
    server.repos["org/name"].granted = set()
    error = refused(lambda: opened().read("config.json", max_bytes=10))
    assert "is gated" in str(error)
    assert "with the account this token belongs to" in str(error)


def test_a_token_that_the_hub_does_not_know(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at(monkeypatch, server, tmp_path, token="hf_mistyped")
    for name in ("org/name", "org/nobody"):
        told = str(refused(lambda name=name: opened(name)))
        assert ("does not accept the token" in told, "hf_mistyped" in told) == (True, False)


def test_a_token_that_cannot_be_one_is_not_quoted(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, server, tmp_path, token="hf_sésame\x01")
    error = refused(opened)
    assert "characters that no token has" in str(error)
    assert "sésame" not in str(error)


def test_a_token_without_the_right(server: HubServer) -> None:
    server.faults.append(refuse(403))
    assert "may not read the repository" in str(refused(opened))


def test_a_disabled_repository(server: HubServer) -> None:
    server.faults.append(refuse(403, X_Error_Message="Access to this resource is disabled."))
    assert "was disabled" in str(refused(opened))


def test_an_unknown_revision(server: HubServer) -> None:
    error = refused(lambda: open_source("org/name", "v2"))
    assert "there is no branch, tag or commit 'v2'" in str(error)
    assert f"{server.endpoint}/org/name/tree/main" in str(error)
    refused(lambda: open_source(f"hf://org/name@{'0' * 40}").list())


def test_a_missing_repository_may_be_a_misspelt_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Llama-7b").mkdir()
    assert "or did you mean Llama-7b?" in str(refused(lambda: open_source("Lama-7b")))


def test_a_source_is_opened_without_torch_or_ray(server: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys; from mergekit_ray.storage import open_source; print(open_source('org/name').uri); "
        "print(*({'torch', 'ray', 'boto3'} & set(sys.modules)))"
    )
    env = environment(server, tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert done.stdout.split() == [pinned(server)]
