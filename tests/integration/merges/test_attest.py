"""The statement of a published model, beside what OpenSSF's own library wrote for a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.operations.attest import statement
from mergekit_ray.output.manifest import Contents
from mergekit_ray.storage.local.store import LocalSource
from support.manifests import make_old
from support.merging import recipe_of, run_command
from support.models import ModelLibrary

# By model-signing 1.1.1 (`sign key`), of a folder with .mergekit/c ("c\n"), a.txt ("a\n") and b.safetensors ("b\n").
REFERENCE_ROOT = "4cdc93a80c981771b8631dfbf4cbd0718504847cef8e63edc6e7044e906b962f"
REFERENCE_FILES = {
    ".mergekit/c": "a3a5e715f0cc574a73c3f9bebb6bc24f32ffd5b67b387244c2c909da779a1478",
    "a.txt": "87428fc522803d31065e7bce3cf03fe475096631e5e07bbd7a0fde60c4cf25c7",
    "b.safetensors": "0263829989b6fd954f72baaf2fc64bc2e2f01d692d4de72986ea808f6e99813f",
}


@pytest.fixture
def published(models: ModelLibrary, tmp_path: Path) -> Path:
    base, tuned = (models.get("llama", variant) for variant in range(2))
    recipe = recipe_of("linear", base, [tuned], output={"max_shard_size": 45_000})
    mergekit_ray.merge(recipe, tmp_path / "out")
    return tmp_path / "out"


def files_of(told: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["digest"] for each in told["predicate"]["resources"]}


def test_the_form_and_the_root_are_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in ((".mergekit/c", "c\n"), ("a.txt", "a\n"), ("b.safetensors", "b\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("mergekit_ray.operations.attest.published_contents", lambda source: Contents([], {}))
    told = statement(LocalSource(str(tmp_path)), "model")
    assert files_of(told) == REFERENCE_FILES
    assert told["subject"] == [{"name": "model", "digest": {"sha256": REFERENCE_ROOT}}]
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["predicateType"] == "https://model_signing/signature/v1.0"
    assert told["predicate"]["serialization"]["method"] == "files"
    assert all(each["algorithm"] == "sha256" for each in told["predicate"]["resources"])


def test_every_file_with_its_digest(published: Path) -> None:
    done = run_command("mergekit-ray", "attest", published)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    files = [file for file in published.rglob("*") if file.is_file()]
    wanted = {file.relative_to(published).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert files_of(told) == wanted
    assert told["subject"][0]["name"] == "out"


def test_no_weight_is_read(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LocalSource.read

    def reading(self: LocalSource, name: str, *, max_bytes: int) -> bytes:
        assert not name.endswith(".safetensors")
        return read(self, name, max_bytes=max_bytes)

    monkeypatch.setattr(LocalSource, "read", reading)
    assert len(files_of(statement(LocalSource(str(published)), "m"))) > 3


def test_a_shard_that_is_not_as_written(published: Path) -> None:
    shard = next(iter(sorted(published.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="instead of"):
        statement(LocalSource(str(published)), "m")
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        statement(LocalSource(str(published)), "m")
    assert shard.name in str(caught.value)


def test_what_is_not_as_published_is_not_signed(published: Path) -> None:
    config = published / "config.json"
    text = config.read_text()
    config.write_text(text.replace("rope", "ROPE"))
    with pytest.raises(CheckpointError, match="SHA-256 differs") as caught:
        statement(LocalSource(str(published)), "m")
    assert str(config) in str(caught.value)
    config.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        statement(LocalSource(str(published)), "m")
    config.write_text(text)
    manifest = published / "mergekit-ray.json"
    manifest.write_text(manifest.read_text().replace('"linear"', '"ties"'))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        statement(LocalSource(str(published)), "m")


def test_a_card_and_a_licence_of_ones_own_are_signed_as_they_are(published: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (published / name).write_text("mine")
    digests = files_of(statement(LocalSource(str(published)), "m"))
    assert digests["README.md"] == digests["LICENSE"] == hashlib.sha256(b"mine").hexdigest()


def test_a_manifest_of_an_earlier_version(published: Path) -> None:
    before = files_of(statement(LocalSource(str(published)), "m"))
    make_old(published)
    after = files_of(statement(LocalSource(str(published)), "m"))
    assert {name for name in before if before[name] != after[name]} == {"mergekit-ray.json"}
