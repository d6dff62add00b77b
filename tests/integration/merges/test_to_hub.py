"""Merges whose results become repositories of the Hub, on a server that speaks its API."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError, PlanError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.tensors import Tensors
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.hub import store as hub_store
from mergekit_ray.storage.hub.branch import BRANCH
from mergekit_ray.storage.transfers import RetryPolicy
from mergekit_ray.worker.worker import SHARDS_IN_WORK
from support.memory_inputs import random_llama, write_model
from support.servers.hub_http import pass_by, refuse
from support.servers.hub_server import TOKEN, Repo, serving
from support.servers.hub_writing import WritableHubServer

QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHubServer]:
    monkeypatch.setattr(hub_store, "RetryPolicy", lambda: QUICK)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(WritableHubServer(), monkeypatch, tmp_path / "home", token=TOKEN) as server:
        yield server


def spooled(tmp_path: Path) -> list[Path]:
    """Temporary files of uploads."""
    return list(tmp_path.glob("mergekit-ray-*"))


def uploaded(server: WritableHubServer) -> int:
    """Requests by which content was sent to the store."""
    return sum(request.method == "PUT" for request in server.requests)


def published_times(server: WritableHubServer) -> int:
    """Commits to ``main``."""
    return sum(branch == "main" for branch, _ in server.messages)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
    side = {"tokenizer__json": '{"version": "1.0"}'}
    return [write_model(tmp_path / f"model-{number}", random_llama(number), config, **side) for number in range(2)]


def recipe(folders: list[Path], weight: float = 1.0) -> dict[str, Any]:
    listed = [{"model": str(folder), "parameters": {"weight": weight + i}} for i, folder in enumerate(folders)]
    return {"merge_method": "linear", "models": listed, "output": {"max_shard_size": 400}}


def expected(folders: list[Path], out: Path, weight: float = 1.0) -> dict[str, bytes]:
    """The files of the same merge to a folder."""
    mergekit_ray.merge(recipe(folders, weight), out)
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_merge_to_the_hub(server: WritableHubServer, folders: list[Path], tmp_path: Path, num_workers: int) -> None:
    options = MergeOptions(num_workers=num_workers)
    result = mergekit_ray.merge(recipe(folders), "hf://org/out", options=options)
    assert result.uri == "hf://org/out"
    repo = server.repos["org/out"]
    files = dict(repo.head())
    assert files.pop(".gitattributes")
    assert files == expected(folders, tmp_path / "local")
    assert verify("hf://org/out").problems == []
    assert torch.equal(result.load_tensor("lm_head.weight"), result.tensors()["lm_head.weight"])
    assert dict(result.tensors().specs) == dict(Tensors.at(str(tmp_path / "local")).specs)
    assert list(repo.branches) == ["main"]
    assert published_times(server) == 1
    assert spooled(tmp_path) == []
    assert TOKEN.encode() not in b"".join(files.values())
    again = mergekit_ray.merge(recipe(folders), "hf://org/out")
    assert again.num_resumed == len(result.plan.shards)
    assert published_times(server) == 1


def test_a_merge_that_broke_off_is_resumed(server: WritableHubServer, folders: list[Path], tmp_path: Path) -> None:
    def fail_late(handler: Any) -> bool:
        shards = [name for name in server.repos["org/out"].head(BRANCH) if name.endswith(".safetensors")]
        # Of three that are there, one at least has been recorded.
        return pass_by(handler) if len(shards) <= SHARDS_IN_WORK else refuse(403)(handler)

    def watch(handler: Any) -> bool:
        return fail_late(handler) if BRANCH in server.repos.get("org/out", Repo("")).branches else True

    server.faults.extend([watch] * 1000)
    with pytest.raises(MergekitRayError):
        mergekit_ray.merge(recipe(folders), "hf://org/out")
    server.faults.clear()
    repo = server.repos["org/out"]
    assert set(repo.head()) == {".gitattributes"}
    sent = uploaded(server)
    with pytest.raises(PlanError, match="is there"):
        mergekit_ray.merge(recipe(folders, 2.0), "hf://org/out")
    result = mergekit_ray.merge(recipe(folders), "hf://org/out")
    assert result.num_resumed >= 1
    files = dict(repo.head())
    del files[".gitattributes"]
    assert files == expected(folders, tmp_path / "local")
    assert list(repo.branches) == ["main"]
    assert uploaded(server) - sent <= len(result.plan.shards) - result.num_resumed


def test_a_merge_that_broke_off_after_it_was_published_is_tidied_up(
    server: WritableHubServer, folders: list[Path]
) -> None:
    def fail_to_remove(handler: Any) -> bool:
        return refuse(403)(handler) if handler.command == "DELETE" else True

    server.faults.extend([fail_to_remove] * 1000)
    with pytest.raises(MergekitRayError):
        mergekit_ray.merge(recipe(folders), "hf://org/out")
    server.faults.clear()
    repo = server.repos["org/out"]
    published = dict(repo.head())
    assert "model.safetensors.index.json" in published
    assert set(repo.branches) == {"main", BRANCH}
    mergekit_ray.merge(recipe(folders), "hf://org/out")
    assert repo.head() == published
    assert published_times(server) == 1
    assert list(repo.branches) == ["main"]


def test_another_model_is_replaced_only_if_told_to(
    server: WritableHubServer, folders: list[Path], tmp_path: Path
) -> None:
    mergekit_ray.merge(recipe(folders), "hf://org/out")
    repo = server.repos["org/out"]
    before = dict(repo.head())
    with pytest.raises(PlanError, match="is there"):
        mergekit_ray.merge(recipe(folders, 2.0), "hf://org/out")
    assert repo.head() == before
    mergekit_ray.merge(recipe(folders, 2.0), "hf://org/out", options=MergeOptions(overwrite=True))
    files = dict(repo.head())
    assert files.pop(".gitattributes")
    assert files == expected(folders, tmp_path / "local", 2.0)
    assert published_times(server) == 2


def test_a_model_is_merged_into_its_own_repository(
    server: WritableHubServer, folders: list[Path], tmp_path: Path
) -> None:
    """If the recipe names its commit: what is read stays, and the same command has nothing to do the second time."""
    server.add("org/out", {file.name: file.read_bytes() for file in folders[0].iterdir()})
    options = MergeOptions(overwrite=True)

    def made(name: str) -> dict[str, Any]:
        listed = [{"model": each, "parameters": {"weight": 1.0 + i}} for i, each in enumerate([name, str(folders[1])])]
        return {**recipe(folders), "models": listed}

    for name in ("org/out", "org/out@main"):
        with pytest.raises(PlanError, match="the output is one of the inputs"):
            mergekit_ray.merge(made(name), "hf://org/out", options=options)
    pinned = made(f"org/out@{server.repos['org/out'].branches['main']}")
    mergekit_ray.merge(pinned, "hf://org/out", options=options)
    assert mergekit_ray.merge(pinned, "hf://org/out", options=options).was_there
    local = expected(folders, tmp_path / "local")
    files = server.repos["org/out"].head()
    weights = {name for name in local if name.endswith(".safetensors")}
    assert {name for name in files if name.endswith(".safetensors")} == weights
    assert all(files[name] == local[name] for name in weights)
