"""Registries: discovery of a package's modules and of entry points."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_ray.core import registry as registries
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.registry import METHODS, PluginWarning, Registry


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


@pytest.fixture
def plugins(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Installs a distribution of modules, each named in an entry point of the group ``fruits``."""
    monkeypatch.setattr(registries, "_broken", set())  # of this process, not of the tests before

    def install(modules: dict[str, str]) -> None:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(f"from {package} import R\n{text}")
        folder = tmp_path / "orchard-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: orchard\nVersion: 1.0\n")
        points = "".join(f"{name} = {name}\n" for name in modules)
        (folder / "entry_points.txt").write_text(f"[fruits]\n{points}")
        importlib.invalidate_caches()

    return install


def test_entry_points_of_other_distributions_are_loaded(
    package: str, plugins: Callable[[dict[str, str]], None]
) -> None:
    plugins({"found_here_plum": "R.register('plum')('a plum')\n"})
    registry = registry_of(package)
    assert registry.names() == ["apple", "pear", "plum"]
    assert registry.get("plum") == "a plum"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("R.register('fig')('half a fig')\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("R.register('apple')('another')\n", "ValueError: fruit 'apple' is registered twice"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_skipped_with_a_warning(
    package: str, plugins: Callable[[dict[str, str]], None], text: str, reason: str
) -> None:
    plugins({"found_here_fig": text, "found_here_plum": "R.register('plum')('a plum')\n"})
    registry = registry_of(package)
    with pytest.warns(PluginWarning) as told:
        assert registry.names() == ["apple", "pear", "plum"]
    assert registry.get("apple") == "an apple"
    [warning] = told
    assert str(warning.message) == (
        f"skipped plugin 'found_here_fig' of orchard (fruits: found_here_fig): {reason}\n"
        "  upgrade, reinstall or uninstall orchard"
    )


def test_registries_of_one_group_warn_once(package: str, plugins: Callable[[dict[str, str]], None]) -> None:
    plugins({"found_here_fig": "raise RuntimeError('rotten')\n"})
    with pytest.warns(PluginWarning, match="rotten"):
        registry_of(package).names()
    assert Registry[str]("seed", package, "fruits").names() == []  # a second warning would be an error


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
