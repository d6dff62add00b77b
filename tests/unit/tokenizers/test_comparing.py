"""Whether models mean the same tokens by the same ids, and how little is read to know."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.tokenizers.comparing import Difference, difference, same_files
from support.tokenizers.tiny import byte_level, data_of, edited, opened, read, save, with_added


class Watched(LocalSource):
    """Notes which files are read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.opened: list[str] = []

    def read(self, name: str, *, max_bytes: int) -> bytes:
        self.opened.append(name)
        return super().read(name, max_bytes=max_bytes)


def watched(checkpoint: Checkpoint) -> tuple[Checkpoint, Watched]:
    """A model whose reads are noted."""
    source = Watched(checkpoint.source.uri)
    return replace(checkpoint, source=source), source


def digested(checkpoint: Checkpoint, **digests: str) -> tuple[Checkpoint, Watched]:
    """A model with the version of each file as the Hub has it; the same for all but the files of ``digests``."""
    found, source = watched(checkpoint)
    files = [
        replace(file, version=f"{digests.get(file.name.partition('.')[0], '0' * 40)}-{file.num_bytes}")
        for file in found.side_files
    ]
    return replace(found, side_files=files), source


def test_nothing_is_read_where_versions_are_digests(tmp_path: Path) -> None:
    a, of_a = digested(save(tmp_path / "a", byte_level()))
    b, of_b = digested(save(tmp_path / "b", byte_level()))
    assert same_files(a, b)
    assert not of_a.opened
    assert not of_b.opened


def test_nothing_is_read_where_the_place_is_the_same(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "a", byte_level())
    (a, of_a), (b, of_b) = watched(checkpoint), watched(checkpoint)
    assert same_files(a, b)
    assert not of_a.opened
    assert not of_b.opened


def test_times_and_sizes_are_no_digests(tmp_path: Path) -> None:
    """Files of one size, written in one tick of the clock."""
    data = data_of(byte_level())
    vocabulary = data["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    save(tmp_path / "a", byte_level())
    save(tmp_path / "b", edited(byte_level(), vocab=vocabulary))
    for file in [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]:
        os.utime(file, ns=(10**18, 10**18))
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert [file.version for file in a.side_files] == [file.version for file in b.side_files]
    assert not same_files(a, b)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert same_files(a, opened(tmp_path / "c"))


def test_vocabularies_of_other_sizes_are_not_read(tmp_path: Path) -> None:
    a, of_a = watched(save(tmp_path / "a", byte_level()))
    b, of_b = watched(save(tmp_path / "b", with_added(byte_level(), "<|b|>")))
    assert not same_files(a, b)
    assert "tokenizer.json" not in [*of_a.opened, *of_b.opened]


def test_a_chat_template_is_no_difference(tmp_path: Path) -> None:
    a, of_a = digested(save(tmp_path / "a", byte_level(), {"eos_token": "a"}), tokenizer_config="a" * 40)
    b, _ = digested(save(tmp_path / "b", byte_level(), {"eos_token": "a", "chat_template": "{{ x }}"}))
    assert same_files(a, b)
    assert of_a.opened == ["tokenizer_config.json"]


@pytest.mark.parametrize(
    "more",
    [
        {"config": {"pad_token": "<pad>"}},
        {"config": {"added_tokens_decoder": {"500": {"content": "<x>"}}}},
        {"special_tokens_map": {"pad_token": "<pad>"}},
        {"added_tokens": {"<x>": 500}},
    ],
)
def test_settings_that_add_tokens_are_a_difference(more: dict[str, Any], tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", byte_level()), save(tmp_path / "b", byte_level(), **more)
    assert not same_files(a, b)
    assert not same_files(b, a)
    assert difference(read(a), read(b)) is not None


def test_models_without_tokenizers_have_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert same_files(opened(tmp_path), opened(tmp_path))
    assert not same_files(opened(tmp_path), save(tmp_path / "a", byte_level()))


def test_how_ids_differ(tmp_path: Path) -> None:
    vocabulary = dict(data_of(byte_level())["model"]["vocab"])
    size = len(vocabulary)
    turned = {token: (number + 1) % 5 if number < 5 else number for token, number in vocabulary.items()}
    a = read(save(tmp_path / "a", with_added(byte_level(), "<|a|>")))
    b = read(save(tmp_path / "b", with_added(edited(byte_level(), vocab=turned), "<|b|>", "<|c|>", "<|d|>")))
    names = a.names()
    assert difference(a, b) == Difference(
        num_other=6,
        examples=((0, names[0], names[4]), (1, names[1], names[0]), (2, names[2], names[1])),
        only_a=(),
        only_b=(size + 1, size + 2),
    )
    assert difference(b, a) == Difference(
        num_other=6,
        examples=((0, names[4], names[0]), (1, names[0], names[1]), (2, names[1], names[2])),
        only_a=(size + 1, size + 2),
        only_b=(),
    )
    assert difference(a, read(save(tmp_path / "c", with_added(byte_level(), "<|a|>")))) is None
