"""kill -9 at every boundary of a merge; the same command then makes the same bytes, and nothing else is left."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import botocore
import pytest

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError, StorageError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.storage.s3 import upload as s3_upload
from mergekit_ray.storage.s3.upload import S3Upload
from support.failures.boundaries import Boundary, Fault
from support.merging import Events, recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import byte_level, save_model
from support.waiting import DEADLINE_SECONDS

LOCAL = MergeOptions(executor="local", num_workers=2)
NUM_SHARDS = 8
PART_BYTES = 5 << 20
"""Of multipart uploads here: the least that S3 takes. Every shard of a large model goes up in three."""

# Children are forked from a process that has imported everything and started no thread.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("mergekit_ray.operations.merge", "mergekit_ray.operations.write_shards", "boto3", "support.models"),
        *("mergekit_ray.storage.local.store", "mergekit_ray.storage.s3.store", "mergekit_ray.evaluation.compiled_sums"),
        *("mergekit_ray.evaluation.nodes.merge", "mergekit_ray.methods.ties", "mergekit_ray.methods.compiled.election"),
        "mergekit_ray.methods.compiled.brackets",
    ]
)


BOUNDARIES: Mapping[str, Boundary] = {
    "planned": Boundary("planned"),
    "leased": Boundary("put_if_absent", after=True, name="lease.json"),
    "reading": Boundary("read", number=2),
    "computed": Boundary("write", number=6),
    "written in part": Boundary("write", after=True, number=6),
    "about to be committed": Boundary("commit", number=2),
    "committed, not recorded": Boundary("commit", after=True, number=2),
    "recorded": Boundary("put", after=True, name=".safetensors.json", number=2, done=2),
    "checked": Boundary("publishing", done=NUM_SHARDS),
    "config": Boundary("put", after=True, name="config.json", done=NUM_SHARDS),
    "card": Boundary("put", after=True, name="README.md", done=NUM_SHARDS),
    "manifest": Boundary("put", after=True, name="mergekit-ray.json", done=NUM_SHARDS),
    "index not yet": Boundary("put", name="model.safetensors.index.json", done=NUM_SHARDS),
    "index": Boundary("put", after=True, name="model.safetensors.index.json", done=NUM_SHARDS),
    "notes gone": Boundary("delete", name="lease.json", done=NUM_SHARDS),
}

ON_S3: Mapping[str, Boundary] = {
    **BOUNDARIES,
    "upload begun": Boundary("UploadPart", number=3),
    "part sent": Boundary("UploadPart", after=True, number=4),
    "all parts sent": Boundary("CompleteMultipartUpload", number=2),
}


def merge_and_die(
    recipe: Mapping[str, Any], out: str, boundary: Boundary, store: str, environment: Mapping[str, str]
) -> None:
    """What the child does."""
    os.environ.update(environment)
    small_parts()
    fault = Fault(boundary, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fault.arm(store)
    mergekit_ray.merge(recipe, out, options=LOCAL, reporter=fault.reporter)


def merge_while_the_store_dies(
    recipe: Mapping[str, Any], out: str, boundary: Boundary, environment: Mapping[str, str], server: int
) -> None:
    """What another child does; ``server`` is the process group that dies. The exit code is the command line's."""
    os.environ.update(environment)
    small_parts()
    fault = Fault(boundary, lambda: os.killpg(server, signal.SIGKILL))
    fault.arm("s3")
    try:
        mergekit_ray.merge(recipe, out, options=LOCAL, reporter=fault.reporter)
    except MergekitRayError as error:
        sys.exit(error.exit_code)


def small_parts() -> None:
    """For the rest of this process."""
    mock.patch.object(s3_upload, "part_bytes_for", return_value=PART_BYTES).start()


def die_and_resume(
    recipe: Mapping[str, Any], out: str, boundary: Boundary, store: str, environment: Mapping[str, str]
) -> None:
    """Run it until it dies, then again."""
    child = FORKS.Process(target=merge_and_die, args=(recipe, out, boundary, store, dict(environment)))
    child.start()
    child.join(DEADLINE_SECONDS)
    assert child.exitcode == -signal.SIGKILL
    result = mergekit_ray.merge(recipe, out, options=LOCAL)
    assert len(result.plan.shards) == NUM_SHARDS
    assert result.num_resumed >= boundary.done


@pytest.fixture(scope="module")
def large(models: ModelLibrary) -> dict[str, Any]:
    """Shards of 12 MB, a layer each."""
    base, tuned = (models.get("llama", variant, num_layers=8, hidden_size=1024, tied=True) for variant in range(2))
    return recipe_of("linear", base, [tuned], output={"max_shard_size": 14_000_000})


@pytest.fixture(scope="module")
def expected_large(large: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(large, tmp_path_factory.mktemp("expected") / "large")


@pytest.fixture(scope="module")
def recipe(models: ModelLibrary) -> dict[str, Any]:
    base, *tuned = (models.get("llama", variant, num_layers=6) for variant in range(3))
    return recipe_of("ties", base, tuned, output={"max_shard_size": 45_000})


@pytest.fixture(scope="module")
def expected(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(recipe, tmp_path_factory.mktemp("expected") / "out")


@pytest.mark.parametrize("name", BOUNDARIES)
def test_on_a_disk(name: str, recipe: dict[str, Any], expected: dict[str, bytes], tmp_path: Path) -> None:
    die_and_resume(recipe, str(tmp_path / "out"), BOUNDARIES[name], "local", {})
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["written in part", "recorded", "index not yet"])
def test_of_models_brought_to_common_tokens(name: str, tmp_path: Path) -> None:
    """The files of the tokenizer are made anew, and are the same."""
    added = {"base": [], "chat": ["<|im_start|>", "<|im_end|>"], "tools": ["<|im_end|>", "<|pad|>"]}
    base, *tuned = (
        save_model(tmp_path / name, byte_level(tokens), len(name), num_hidden_layers=5)
        for name, tokens in added.items()
    )
    given = recipe_of("ties", base, tuned, output={"max_shard_size": 3000}) | {"tokenizer_source": "union"}
    expected = undisturbed(given, tmp_path / "expected")
    die_and_resume(given, str(tmp_path / "out"), BOUNDARIES[name], "local", {})
    assert contents(tmp_path / "out") == expected
    assert b"<|pad|>" in expected["tokenizer.json"]


@pytest.mark.s3
@pytest.mark.parametrize("name", ON_S3)
def test_on_s3(
    name: str,
    large: dict[str, Any],
    expected_large: dict[str, bytes],
    s3_environment: S3Server,
    s3_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(s3_upload, "part_bytes_for", lambda num_bytes: PART_BYTES)
    bucket = Bucket(s3_environment, s3_prefix)
    die_and_resume(large, f"{s3_prefix}/out", ON_S3[name], "s3", s3_environment.environment)
    assert bucket.unfinished() == []
    bucket.download("out", tmp_path / "out")
    assert contents(tmp_path / "out") == expected_large


STORE_BOUNDARIES = (
    "planned",
    "reading",
    "part sent",
    "all parts sent",
    "committed, not recorded",
    "recorded",
    "manifest",
    "index",
)
"""One of each phase: this server takes seconds to come back."""


@pytest.fixture(scope="module")
def mortal() -> Iterator[S3Server]:
    """A server of our own to kill."""
    with S3Server() as server:
        server.create_bucket("merges")
        yield server


@pytest.mark.s3
@pytest.mark.parametrize("name", STORE_BOUNDARIES)
def test_the_store_itself_is_killed(
    name: str,
    large: dict[str, Any],
    expected_large: dict[str, bytes],
    mortal: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It comes back after seconds: the merge goes on, or ends with exit code 4 and is then resumed."""
    for variable, value in mortal.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(s3_upload, "part_bytes_for", lambda num_bytes: PART_BYTES)
    prefix = f"s3://merges/{name.replace(' ', '-').replace(',', '')}"
    bucket, environment = Bucket(mortal, prefix), dict(mortal.environment)
    child = FORKS.Process(
        target=merge_while_the_store_dies,
        args=(large, f"{prefix}/out", ON_S3[name], environment, mortal.process_group),
    )
    child.start()
    mortal.wait_for_death(DEADLINE_SECONDS)
    mortal.restart()
    child.join(DEADLINE_SECONDS)
    assert child.exitcode in (0, StorageError.exit_code)
    if child.exitcode != 0:
        assert "model.safetensors.index.json" not in bucket.keys("out") or name == "index"
    mergekit_ray.merge(large, f"{prefix}/out", options=LOCAL)
    assert bucket.unfinished() == []
    bucket.download("out", tmp_path / "out")
    assert contents(tmp_path / "out") == expected_large


@pytest.mark.s3
def test_what_a_failed_attempt_could_not_clean_up_is_gone_in_the_end(
    large: dict[str, Any], s3_environment: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part fails, and so does the abort of its upload, as while a store is away; the shard is tried again."""
    monkeypatch.setattr(s3_upload, "part_bytes_for", lambda num_bytes: PART_BYTES)
    abort, aborts = S3Upload.abort, itertools.count(1)

    def reset() -> None:
        raise StorageError("the connection was reset", where=s3_prefix, retryable=True)

    def sometimes(upload: S3Upload) -> None:
        if next(aborts) > 1:
            abort(upload)

    monkeypatch.setattr(S3Upload, "abort", sometimes)
    fault, events = Fault(Boundary("UploadPart", number=4), reset), Events()
    botocore.register_initializer(fault.watch)
    try:
        mergekit_ray.merge(large, f"{s3_prefix}/out", options=LOCAL, reporter=events)
    finally:
        botocore.unregister_initializer(fault.watch)
    assert len(events.of("shard_retried")) == 1
    assert Bucket(s3_environment, s3_prefix).unfinished() == []
