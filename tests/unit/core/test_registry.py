"""Registries: discovery of a package's modules and of entry points."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from pathlib import Path

import pytest

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.registry import METHODS, Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of two entries, one of them slow to import, whose registry is in the module `home`."""
    folder = tmp_path / "found_here"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mergekit_ray.core.registry import Registry\nR = Registry('fruit', 'found_here', 'fruits')\n"
    )
    (folder / "apple.py").write_text(
        "import time\nfrom found_here import R\ntime.sleep(0.05)\nR.register('apple')('an apple')\n"
    )
    (folder / "pear.py").write_text(
        "import time\nfrom found_here import R\ntime.sleep(0.05)\nR.register('pear')('a pear')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {n: m for n, m in sys.modules.items() if not n.startswith("found_here")})
    return "found_here"


def registry_of(package: str) -> Registry[str]:
    import importlib

    found: Registry[str] = importlib.import_module(package).R
    return found


def test_entries_are_found_by_importing_the_package(package: str) -> None:
    registry = registry_of(package)
    assert registry.names() == ["apple", "pear"]
    assert registry.get("pear") == "a pear"
    assert "apple" in registry
    assert "plum" not in registry


def test_an_unknown_name_is_answered_with_the_nearest(package: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry_of(package).get("aple")
    assert str(caught.value) == "unknown fruit 'aple'; did you mean 'apple'?\n  accepted: apple, pear"


def test_a_name_is_registered_once(package: str) -> None:
    registry = registry_of(package)
    registry.get("apple")
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        registry.register("apple")("another")
    assert registry.get("apple") == "an apple"


def test_a_second_thread_waits_for_the_whole_table(package: str) -> None:
    registry = registry_of(package)
    start, seen = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        seen.append(registry.names())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["apple", "pear"]] * 4


def test_entry_points_of_other_distributions_are_loaded(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(package)
    asked = []

    class Point:
        def load(self) -> None:
            registry.register("plum")("a plum")

    def entry_points(*, group: str) -> list[Point]:
        asked.append(group)
        return [Point()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert registry.names() == ["apple", "pear", "plum"]
    assert registry.get("plum") == "a plum"
    assert asked == ["fruits"]  # once, however often the registry is asked


def test_a_module_that_fails_to_import_is_not_forgotten(package: str, tmp_path: Path) -> None:
    registry = registry_of(package)
    broken = tmp_path / "found_here" / "quince.py"
    broken.write_text("raise RuntimeError('not ripe')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not ripe"):
            registry.names()


def test_the_methods_are_registered_under_their_own_names() -> None:
    names = {"linear", "slerp", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
    assert names <= set(METHODS.names())
    assert all(METHODS.get(name).name == name for name in METHODS.names())
