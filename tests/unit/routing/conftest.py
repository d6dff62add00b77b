"""Small models for routers, and arithmetic on one thread."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_ray.evaluation.threads import single_threaded_torch
from support.models import ModelLibrary


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are so small that threads cost more than they bring."""
    with single_threaded_torch():
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ModelLibrary:
    return ModelLibrary(tmp_path_factory.mktemp("models"))


@pytest.fixture
def llama(library: ModelLibrary, tmp_path: Path) -> Path:
    """A Llama with a tokenizer, to be changed at will."""
    return Path(shutil.copytree(library.get(with_tokenizer=True), tmp_path / "llama"))
