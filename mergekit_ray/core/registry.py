"""Registries: a name in a recipe becomes a class.

A registry finds its entries by importing every module of one package of ours and every entry point of one group, the
first time it is asked. Adding an entry is adding a file.

A plugin, an entry point of another distribution, that cannot be imported is skipped with a `PluginWarning`: it must not
keep those from working who do not use it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import threading
import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.spelling import nearest

T = TypeVar("T")

_broken: set[importlib.metadata.EntryPoint] = set()
"""Plugins that could not be imported: several registries may have a group in common, and one warning will do."""


class PluginWarning(UserWarning):
    """An entry point of another distribution is skipped."""


class Registry(Generic[T]):
    """Named entries of one kind.

    Args:
        kind: what an entry is, in words for messages ("merge method").
        package: package whose modules register entries when imported.
        group: entry-point group by which other distributions add modules.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self._kind = kind
        self._package = package
        self._group = group
        self._entries: dict[str, T] = {}
        self._discovered = False
        self._discovery = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ConfigError: no such entry; lists what there is and the nearest name.
        """
        self._discover()
        if name not in self._entries:
            raise ConfigError(
                f"unknown {self._kind} {name!r}{nearest(name, self._entries)}",
                remedy=f"accepted: {', '.join(self.names())}",
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def _discover(self) -> None:
        with self._discovery:  # another thread that asks meanwhile must wait for the whole table
            if self._discovered:
                return
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, prefix=f"{self._package}."):
                importlib.import_module(module.name)
            for entry_point in importlib.metadata.entry_points(group=self._group):
                self._load(entry_point)
            self._discovered = True

    def _load(self, plugin: importlib.metadata.EntryPoint) -> None:
        if plugin in _broken:
            return
        before = dict(self._entries)
        try:
            plugin.load()
        except Exception as error:  # noqa: BLE001 - whatever another's code raises
            self._entries = before
            _broken.add(plugin)
            package = plugin.dist.name if plugin.dist is not None else "an unknown package"
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"skipped plugin {plugin.name!r} of {package} ({self._group}: {plugin.value}): {reason}\n"
                f"  upgrade, reinstall or uninstall {package}",
                PluginWarning,
                stacklevel=2,
            )


METHODS: Registry[type[MethodDeclaration]] = Registry("merge method", "mergekit_ray.methods", "mergekit_ray.methods")
