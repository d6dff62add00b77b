from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GB", 2_000_000_000),
        ("500M", 500_000_000),
        ("1G", 1_000_000_000),
        ("5GiB", 5 * 1024**3),
        ("1.5 gb", 1_500_000_000),
        (".5KiB", 512),
        ("7", 7),
        ("10B", 10),
        (123, 123),
        (2e9, 2_000_000_000),
    ],
)
def test_sizes_count_in_thousands_unless_binary(text: object, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "0", 0, -5, True, None, "1XB", "1iB", "5 GB/s", 1.5, float("nan"), "9" * 99]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|bytes|byte"):
        parse_size(text)


@given(st.integers(1, 1 << 60))
def test_sizes_survive_a_round_trip(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("text", "path", "revision", "lora"),
    [
        ("org/model", "org/model", None, None),
        ("org/model@v1.0", "org/model", "v1.0", None),
        ("org/model@refs/pr/1+org/lora@v2", "org/model", "refs/pr/1", ModelReference("org/lora", "v2")),
        ("./my models/a b/", "./my models/a b", None, None),
        ("/data/base+/data/lora", "/data/base", None, ModelReference("/data/lora")),
        ("/data/x@home", "/data/x@home", None, None),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c", None, None),
        ("hf://org/model@main", "hf://org/model", "main", None),
        (r"./a\+b", "./a+b", None, None),
        (r"org/a\@b@c", "org/a@b", "c", None),
        ("  org/model \t", "org/model", None, None),
    ],
)
def test_references_are_read(text: str, path: str, revision: str | None, lora: ModelReference | None) -> None:
    assert ModelReference.parse(text) == ModelReference(path, revision, lora)


@pytest.mark.parametrize(
    "data",
    [
        {"model": {"path": "org/a", "revision": "r"}, "lora": {"path": "org/l"}},
        {"model": "org/a@r", "lora": "org/l", "override_architecture": "x"},
        {"path": "org/a", "revision": "r", "lora": {"path": "org/l", "revision": None}},
        ModelReference("org/a", "r", ModelReference("org/l")),
        "org/a@r+org/l",
    ],
)
def test_all_forms_mean_the_same(data: object) -> None:
    reference = ModelReference.from_data(data)
    assert reference == ModelReference("org/a", "r", ModelReference("org/l"))
    assert hash(reference) == hash(ModelReference.parse(str(reference)))


def test_a_path_object_is_a_folder_not_a_repository() -> None:
    assert ModelReference.from_data(Path("models/a@b")) == ModelReference("./models/a@b")


@pytest.mark.parametrize(
    "data",
    [
        *("", " ", "org/a@", "+x", "a+b+c", "a\nb", None, 3, [], {}),
        *({"path": 3}, {"path": "a", "revision": 7}, {"path": "a", "revison": "b"}, {"path": "/a", "revision": "r"}),
        *({"model": "a", "path": "b"}, {"model": "a@b", "revision": "c"}, {"model": "a+b", "lora": "c"}),
    ],
)
def test_what_is_no_reference_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        ModelReference.from_data(data)


PART = st.text(st.sampled_from("ab/@+\\ .:~s3hf-é"), min_size=1, max_size=12)


@given(PART, st.none() | PART, st.none() | st.tuples(PART, st.none() | PART))
def test_references_survive_a_round_trip(path: str, revision: str | None, lora: tuple[str, str | None] | None) -> None:
    try:
        reference = ModelReference(path, revision, ModelReference(*lora) if lora else None)
    except ValueError:
        return
    assert ModelReference.parse(str(reference)) == reference
