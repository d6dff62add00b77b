"""Merges of repositories of the Hub, on a server that speaks its API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.plan import plan
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.storage.hub import source as hub
from mergekit_ray.storage.transfers import RetryPolicy
from support.memory_inputs import random_llama, write_model
from support.merging import run_command
from support.servers.hub_http import break_after, refuse, reset
from support.servers.hub_server import TOKEN, HubServer, content_id, environment, point_at, serving

QUICK = RetryPolicy(max_attempts=4, base_seconds=0.001)
BUSY = refuse(503)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, which this process's huggingface_hub takes for the only one."""
    monkeypatch.setattr(hub, "RetryPolicy", lambda: QUICK)
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:
        yield server


def pinned(server: HubServer, name: str) -> str:
    """The repository at its commit, which a worker opens."""
    return f"hf://{name}@{server.repos[name].branches['main']}"


@pytest.fixture
def repositories(server: HubServer, tmp_path: Path) -> list[Path]:
    """Two models, in folders and as private repositories ``org/model-0`` and ``org/model-1``."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
    folders = []
    for number in range(2):
        side = {"tokenizer__json": '{"version": "1.0"}'}
        folder = write_model(tmp_path / f"model-{number}", random_llama(number), config, **side)
        name = f"org/model-{number}"
        server.add(name, {file.name: file.read_bytes() for file in folder.iterdir()})
        server.repos[name].readers = {TOKEN}
        folders.append(folder)
    return folders


def recipe(models: list[Any]) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1 + number}} for number, model in enumerate(models)]
    return {"merge_method": "linear", "models": listed, "output": {"max_shard_size": 400}}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_merge_from_the_hub(
    server: HubServer, repositories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, server, tmp_path / "home", token=TOKEN)
    mergekit_ray.merge(recipe(repositories), tmp_path / "local")
    names = ["org/model-0", "hf://org/model-1@main"]
    server.store_faults.extend([BUSY, break_after(100), reset])
    mergekit_ray.merge(recipe(names), tmp_path / "hub")
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")
    assert (tmp_path / "hub" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    inputs = json.loads((tmp_path / "hub" / "mergekit-ray.json").read_text())["inputs"]
    for number, reference in enumerate(names):
        [found] = [entry for key, entry in inputs.items() if key.startswith(reference)]
        assert found["uri"] == pinned(server, f"org/model-{number}")
        data = (repositories[number] / "model.safetensors").read_bytes()
        file = {"num_bytes": len(data), "version": f"{content_id('model.safetensors', data)}-{len(data)}"}
        assert found["files"]["model.safetensors"].items() >= file.items()
    assert "org/model-0" in (tmp_path / "hub" / "README.md").read_text()
    assert not (tmp_path / "home" / "hub").exists()


def test_single_files_of_repositories(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, server, tmp_path / "home", token=TOKEN)
    for number, place in enumerate(("unet/unet.safetensors", "unet.safetensors")):
        write_model(tmp_path / f"{number}", random_llama(number), {})
        data = (tmp_path / f"{number}" / "model.safetensors").read_bytes()
        server.add(f"org/model-{number}", {place: data, "model_index.json": b"{}", "README.md": b""})
    names = ["org/model-0/unet/unet.safetensors@main", "hf://org/model-1/unet.safetensors"]
    mergekit_ray.merge(recipe(names), tmp_path / "hub")
    mergekit_ray.merge(
        recipe([tmp_path / f"{number}" / "model.safetensors" for number in range(2)]), tmp_path / "local"
    )
    assert {*weights(tmp_path / "hub").values()} == {*weights(tmp_path / "local").values()}
    assert "unet.safetensors.index.json" in {path.name for path in (tmp_path / "hub").iterdir()}
    inputs = json.loads((tmp_path / "hub" / "mergekit-ray.json").read_text())["inputs"]
    commits = [server.repos[f"org/model-{number}"].branches["main"] for number in range(2)]
    expected = [
        f"hf://org/model-0/unet/unet.safetensors@{commits[0]}",
        f"hf://org/model-1/unet.safetensors@{commits[1]}",
    ]
    assert [entry["uri"] for entry in inputs.values()] == expected
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model:\n- org/model-0\n- org/model-1\n" in card
    assert reproduce(tmp_path / "hub", tmp_path / "again").ok


def test_a_repository_that_moves_on_is_merged_as_it_was_planned(
    server: HubServer, repositories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, server, tmp_path / "home", token=TOKEN)
    planned = plan(recipe(["org/model-0", "org/model-1"]))
    assert TOKEN not in json.dumps(planned.to_json())
    server.add("org/model-0", {"config.json": b"{}"})
    run_plan(planned, str(tmp_path / "hub"), MergeOptions())
    mergekit_ray.merge(recipe(repositories), tmp_path / "local")
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")


def test_the_token_is_nowhere_to_be_found(server: HubServer, repositories: list[Path], tmp_path: Path) -> None:
    """The command as a user runs it: what it prints, with and without an error, and all it writes."""
    file = tmp_path / "recipe.yml"
    file.write_text(json.dumps(recipe(["org/model-0", "org/model-1"])))
    env = environment(server, tmp_path / "home", token=TOKEN)
    server.store_faults.append(BUSY)
    done = run_command("mergekit-ray", "merge", file, tmp_path / "out", "--debug", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    server.repos["org/model-1"].readers = set()
    failed = run_command("mergekit-ray", "plan", file, "--debug", cwd=tmp_path, env=env)
    assert failed.returncode == 3, failed.stderr
    assert "hf://org/model-1" in failed.stderr
    told = "".join(each.stdout + each.stderr for each in (done, failed))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert any(request.authorization == f"Bearer {TOKEN}" for request in server.requests)
    for secret in (TOKEN, "Signature="):
        assert secret not in told
        assert secret.encode() not in written
