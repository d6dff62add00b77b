"""United tokenizers: the same bytes wherever models lie and whoever computes, and when a merge is done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import contents
from support.servers.hub_server import HubServer, serving
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import byte_level, ids_of, save_model

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
LOCAL = MergeOptions(executor="local", num_workers=2)
OF_PLACES = ("README.md", "mergekit-ray.json")
"""The files that say where the models were."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and two fine-tunes of it that added tokens."""
    root = tmp_path_factory.mktemp("vocabularies")
    added = {"base": [], "chat": [START, END], "tools": [END, PAD]}
    return {name: save_model(root / name, byte_level(each), len(each) + len(name)) for name, each in added.items()}


def recipe(places: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A union in several shards, of places by name."""
    listed = [{"model": str(places[name]), "parameters": {"weight": 0.5, "density": 0.6}} for name in ("chat", "tools")]
    given = {"merge_method": "ties", "base_model": str(places["base"]), "models": listed, "dtype": "float32"}
    return {**given, "tokenizer_source": "union", "output": {"max_shard_size": 4000}, **rest}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of the merge on disk."""
    out = tmp_path_factory.mktemp("expected") / "out"
    mergekit_ray.merge(recipe(folders), out, options=LOCAL)
    assert {START, END, PAD} <= ids_of(out).keys()
    return contents(out)


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name] and name not in OF_PLACES] == []


@pytest.mark.s3
def test_from_s3_to_s3(
    folders: dict[str, Path], expected: dict[str, bytes], s3_environment: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    bucket = Bucket(s3_environment, s3_prefix)
    places = {name: bucket.upload(folder, name) for name, folder in folders.items()}
    mergekit_ray.merge(recipe(places), f"{bucket.uri}/out", options=LOCAL)
    assert_same(bucket.download("out", tmp_path / "out"), expected)
    assert verify(open_source(f"{bucket.uri}/out")).problems == []


@pytest.mark.ray
def test_by_ray(folders: dict[str, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    with RayCluster(num_nodes=2):
        options = MergeOptions(executor="ray", num_workers=2)
        mergekit_ray.merge(recipe(folders), tmp_path / "out", options=options)
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def hub(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with the models as ``org/base``, ``org/chat`` and ``org/tools``."""
    with serving(HubServer(), monkeypatch, tmp_path / "home") as server:
        for name, folder in folders.items():
            server.add(f"org/{name}", {file.name: file.read_bytes() for file in folder.iterdir()})
        yield server


ON_HUB = {name: f"org/{name}" for name in ("base", "chat", "tools")}


def test_from_the_hub(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    mergekit_ray.merge(recipe(ON_HUB), tmp_path / "out", options=LOCAL)
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize("source", ["union", "org/tools"])
def test_reproduced_with_the_tokenizers_of_then(
    source: str, hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of a model that gives nothing but its tokenizer, too."""
    given = recipe(ON_HUB, tokenizer_source=source)
    given["models"] = given["models"][: 2 if source == "union" else 1]
    mergekit_ray.merge(given, tmp_path / "out", options=LOCAL)
    for name in ("chat", "tools"):
        hub.add(f"org/{name}", {"tokenizer.json": with_other_tokens(folders[name])})
    found = reproduce(tmp_path / "out", tmp_path / "again", LOCAL)
    assert (found.problems, found.notes) == ((), ())
    assert_same(tmp_path / "again", contents(tmp_path / "out"))


def with_other_tokens(folder: Path) -> bytes:
    """A tokenizer's file with another last token."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"][-1]["content"] = "<|other|>"
    return json.dumps(data).encode()


@pytest.mark.parametrize("changed", ["base", "tools"])
def test_a_tokenizer_that_changed_is_told(changed: str, folders: dict[str, Path], tmp_path: Path) -> None:
    places = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    mergekit_ray.merge(recipe(places), tmp_path / "out", options=LOCAL)
    same = reproduce(tmp_path / "out", tmp_path / "same", LOCAL)
    assert (same.problems, same.notes) == ((), ())
    (places[changed] / "tokenizer.json").write_bytes(with_other_tokens(folders[changed]))
    (places[changed] / "tokenizer_config.json").write_text("{}")
    found = reproduce(tmp_path / "out", tmp_path / "again", LOCAL)
    assert any(problem.startswith("tokenizer.json: came out different") for problem in found.problems)
