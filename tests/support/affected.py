"""A pytest plugin: of all tests it keeps those that new entries of the registries can break.

They are those that pytest does not collect in a tree without the entries (tests of their own, and tests parametrised by
a registry), those that ask a registry for all it has, directly or by what lists or chooses from it, and whole folders
where that is what tests are about.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest

from mergekit_ray.core.registry import Registry

KNOWN = "MERGEKIT_RAY_KNOWN_TESTS"
"""Environment variable: the file that lists the tests of the tree without the entries, by their node ids."""

_FOLDERS = ("tests/unit/architectures", "tests/unit/core", "tests/unit/test_docs.py", "tests/unit/test_recipe_schema")
_LISTS = re.compile(
    r"\.names\(\)|\bchoose\(|\bdescribe_methods\b|\bmethods_markdown\b|[\"']methods[\"']|\bsphinx\b|accepted: "
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = set(Path(os.environ[KNOWN]).read_text().splitlines())
    kept = [item for item in items if item.nodeid not in known or item.nodeid.startswith(_FOLDERS) or _asks(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _asks(item: pytest.Item) -> bool:
    """Whether a test asks for more than an entry by its name."""
    assert isinstance(item, pytest.Function)
    function = inspect.unwrap(item.function)
    source = inspect.getsource(function)
    registries = [name for name, value in function.__globals__.items() if isinstance(value, Registry)]
    return bool(_LISTS.search(source)) or any(re.search(rf"\b{name}\b(?!\.get\()", source) for name in registries)
