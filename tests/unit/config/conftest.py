"""The registry that these tests validate recipes against."""

from __future__ import annotations

import pytest

from support.declared_methods import Methods, declared_methods


@pytest.fixture(scope="session")
def methods() -> Methods:
    return declared_methods()
