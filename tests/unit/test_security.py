"""What docs/security.md claims and no other test holds; and that the tests it names are there."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import SSLError

from mergekit_ray.core.plan import Plan
from mergekit_ray.executors.driver import Job
from mergekit_ray.output.lease import hold
from mergekit_ray.reporting.reporters import SilentReporter
from mergekit_ray.storage.fence import LEASE_FILE
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.s3.client import make_client
from mergekit_ray.worker.resources import WorkerOptions
from support.servers.s3_server import make_certificate

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mergekit_ray"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-key-id",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_SESSION_TOKEN": "planted-session",
    "HF_TOKEN": "hf_planted",
}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Secrets in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module could run what it reads."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            found.append(ast.unparse(node.func))
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("shell=")
    return found


def test_nothing_runs_what_it_reads() -> None:
    assert unsafe(ast.parse("import pickle\ntorch.load(x)\nrun(x, shell=True)")) == ["pickle", "torch.load", "shell="]
    assert {name: found for name, tree in trees() if (found := unsafe(tree))} == {}


def test_code_of_a_model_is_never_trusted() -> None:
    said = [
        ast.unparse(node.value)
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    ]
    assert said
    assert set(said) == {"False"}
    loaders = [
        (name, ast.unparse(node.func))
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.search(r"\bAuto\w+\.from_(pretrained|config)$", ast.unparse(node.func))
        and not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
    ]
    assert loaders == []


class Recorder(pickle.Unpickler):
    """Notes what a pickle looks up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.found: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.found.add(f"{module}.{name}")
        return super().find_class(module, name)


def job_of(plan: Plan) -> Job:
    return Job(plan.inputs, "s3://bucket/out", ".mergekit-ray/x", WorkerOptions(memory_bytes=1 << 30))


def test_workers_are_sent_data_only(plan: Plan) -> None:
    job = job_of(plan)
    recorder = Recorder(pickle.dumps(job))
    assert recorder.load() == job
    # Records and nothing else: no function, and no way to rebuild an object by calling one.
    assert recorder.found == {
        "mergekit_ray.core.plan.InputFile",
        "mergekit_ray.core.plan.InputModel",
        "mergekit_ray.executors.driver.Job",
        "mergekit_ray.worker.resources.WorkerOptions",
    } | (recorder.found & {"copyreg.__newobj__", "copyreg._reconstructor", "builtins.object"})
    for shard in plan.shards:
        sent = shard.to_json()
        assert json.loads(json.dumps(sent)) == json.loads(json.dumps(sent, default=_refuse))


def _refuse(value: object) -> None:
    raise AssertionError(f"{value!r} is not data")


def test_ray_is_told_no_secret(plan: Plan, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from mergekit_ray.executors.ray_cluster import connect

    told: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: told.update(options))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect(None)
    assert told.keys() <= {"address", "log_to_driver", "logging_level", "include_dashboard"}
    sent = [repr(told), repr(pickle.dumps(job_of(plan))), *(json.dumps(shard.to_json()) for shard in plan.shards)]
    assert not any(secret in text for secret in planted.values() for text in sent)


def test_a_lease_holds_no_secret(planted: dict[str, str], tmp_path: Path) -> None:
    with hold(LocalStore(tmp_path), SilentReporter(), threading.Event()):
        text = (tmp_path / LEASE_FILE).read_text()
    assert not any(secret in text for secret in planted.values())


@contextlib.contextmanager
def vouching_for_itself(folder: Path) -> Iterator[str]:
    """The address of a server with a certificate that nobody else has signed."""
    make_certificate(folder, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")

    def answer() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_certificates_are_verified(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    client = make_client("s3://bucket", num_connections=1)
    assert client.meta.endpoint_url.startswith("https://")
    with vouching_for_itself(tmp_path) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(SSLError, match="self-signed certificate"):
            make_client("s3://bucket", num_connections=1).list_buckets()
    said = [
        (name, ast.unparse(node))
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in ("verify", "verify_ssl", "check_hostname", "cert_reqs")
    ]
    assert said == []


def test_the_page_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| ") and "`tests/" in row]
    claims = [row for row in page.splitlines() if row.startswith("| ") and not row.startswith("| claim")]
    assert rows == claims, "every claim names a test"
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) >= len(rows)
    for file, name in named:
        text = (ROOT / file).read_text()
        assert not name or f"def {name}(" in text, f"{file} has no {name}"
