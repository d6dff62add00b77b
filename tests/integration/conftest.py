"""Fixtures of the integration tests: checkpoints to merge."""

from __future__ import annotations

import pytest

from support.models import ModelLibrary


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelLibrary:
    """Small checkpoints, made when first asked for. Tests may read them and must not change them."""
    return ModelLibrary(tmp_path_factory.mktemp("models"))
