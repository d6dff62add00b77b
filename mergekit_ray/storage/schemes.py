"""The table of URI schemes. A store registers the function that opens its URIs; third parties do so by entry point."""

from __future__ import annotations

from typing import Protocol

from mergekit_ray.core.registry import Registry
from mergekit_ray.storage.protocols import Sink, Source


class Opener(Protocol):
    """Opens one scheme's URIs. What it returns may also be a `Sink`."""

    def __call__(self, uri: str, revision: str | None) -> Source:
        """A store at ``uri`` (scheme included), at ``revision`` where the scheme has such.

        Raises:
            ModelError: there is no such place, or the scheme has no revisions and one is given.
        """
        ...


class SinkOpener(Protocol):
    """Opens one scheme's URIs to be written."""

    def __call__(self, uri: str) -> Sink:
        """A store at ``uri`` (scheme included). It need not exist yet.

        Raises:
            ConfigError, ModelError: nothing can be written there.
        """
        ...


SCHEMES: Registry[Opener] = Registry("storage scheme", "mergekit_ray.storage", "mergekit_ray.stores")
SINKS: Registry[SinkOpener] = Registry("writable storage scheme", "mergekit_ray.storage", "mergekit_ray.stores")
"""Schemes whose places are opened otherwise to be written than to be read. The others' openers serve for both."""
