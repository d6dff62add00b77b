"""Recipes in stores."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, MergekitRayError
from mergekit_ray.operations.recipes import is_uri, with_shard_size
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.schemes import SCHEMES

TEXT = "merge_method: linear\nmodels:\n  - model: a/b\n    parameters: {weight: 1e-1}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/merge.yml", True),
        ("hf://org/name/merge.yml", True),
        ("merge.yml", False),
        ("/data/s3/merge.yml", False),
        ("merge_method: linear\nmodels: [s3://a/b]", False),
        ("output: s3://bucket/merged", False),
    ],
)
def test_what_is_a_uri(text: str, expected: bool) -> None:
    assert is_uri(text) is expected


def test_a_recipe_at_a_uri_is_that_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(TEXT)
    assert mergekit_ray.load_recipe(f"file://{tmp_path}/merge.yml") == mergekit_ray.load_recipe(TEXT)


def test_what_is_wrong_is_told_with_the_uri_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(TEXT.replace("weight", "wieght"))
    uri = f"file://{tmp_path}/merge.yml"
    with pytest.raises(ConfigError, match="wieght") as caught:
        mergekit_ray.load_recipe(uri)
    assert f"{uri}:4" in str(caught.value)


@pytest.mark.parametrize("name", ["merge.yml", "", "none/merge.yml"])
def test_one_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(MergekitRayError) as caught:
        mergekit_ray.load_recipe(f"file://{tmp_path}/{name}")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code in (2, 3)


def test_names_below_a_repository_belong_to_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "merge.yml").write_text(TEXT)

    def opener(uri: str, revision: str | None) -> LocalSource:
        asked.append(uri)
        return LocalSource(str(tmp_path))

    monkeypatch.setattr(SCHEMES, "get", lambda scheme: opener)
    assert mergekit_ray.load_recipe("hf://org/name/recipes/merge.yml").merge_method == "linear"
    assert asked == ["hf://org/name"]


@pytest.mark.parametrize("stages", [1, 2])
def test_the_size_of_shards_is_that_of_every_stage(stages: int) -> None:
    text = "---\n".join(f"name: s{i}\n{TEXT.replace('a/b', f's{i - 1}' if i else 'a/b')}" for i in range(stages))
    recipe = mergekit_ray.load_recipe(f"{text}output: {{path: ./out, max_shard_size: 3GB}}\n")
    changed = with_shard_size(recipe, 7)
    assert [each.output.max_shard_size for each in getattr(changed, "stages", [changed])] == [7] * stages
    assert changed.output.path == "./out"
    assert recipe.output.max_shard_size == 3_000_000_000
