"""Something happens to a process at a boundary of a merge: before or after an event, or a call to a store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import botocore
import botocore.session

from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.local.upload import LocalUpload
from mergekit_ray.storage.s3.store import S3Store
from mergekit_ray.storage.s3.upload import S3Upload
from support.merging import Events


@dataclass(frozen=True)
class Boundary:
    """Where something happens to the process.

    Attributes:
        place: the kind of an event; ``read``; or a call to a store: ``put``, ``delete`` and the like of a `Sink`,
            ``write`` and ``commit`` of an `Upload`, ``UploadPart`` and other operations of S3.
        after: once the call is over instead of before it.
        name: only calls about a file whose name ends so count.
        number: which of those calls it is.
        done: how many shards at least are found to be done afterwards.
    """

    place: str
    after: bool = False
    name: str = ""
    number: int = 1
    done: int = 0


UPLOAD_CALLS = {"write", "commit"}
SINK_CALLS = {"put", "put_if_absent", "delete"}
CLASSES: Mapping[str, tuple[type, type]] = {"local": (LocalUpload, LocalStore), "s3": (S3Upload, S3Store)}


class Fault:
    """Has something happen at a boundary, once.

    Args:
        boundary: where.
        strike: what happens.
    """

    def __init__(self, boundary: Boundary, strike: Callable[[], None]) -> None:
        self._boundary = boundary
        self._strike = strike
        self._reached = itertools.count(1)
        self.reporter = Events(self._at)

    def arm(self, store: str) -> None:
        """For the rest of this process, in a store of this kind."""
        place = self._boundary.place
        upload, sink = CLASSES[store]
        if place in UPLOAD_CALLS:
            self._wrap(upload, place)
        elif place in SINK_CALLS:
            self._wrap(sink, place)
        elif place == "read":
            for name in ("read_ranges", "map_range"):
                self._wrap(LocalSource, name)
        else:
            botocore.register_initializer(self.watch)

    def watch(self, session: botocore.session.Session) -> None:
        """What new sessions of boto3 are given to: their requests may be boundaries."""
        moment = "after" if self._boundary.after else "before"
        session.register(f"{moment}-call.s3.{self._boundary.place}", lambda **_: self._at(self._boundary.place))

    def _wrap(self, owner: type, method: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def wrapped(*args: Any, **options: Any) -> Any:
            if not self._boundary.after:
                self._at(self._boundary.place, *args[1:2])
            result = original(*args, **options)
            # Calls that are over are counted, not calls begun: the other worker's may still be under way.
            if self._boundary.after:
                self._at(self._boundary.place, *args[1:2])
            return result

        setattr(owner, method, wrapped)

    def _at(self, place: str, about: object = "") -> None:
        names = [about] if isinstance(about, str) else about if isinstance(about, list) else [""]
        counts = place == self._boundary.place and any(name.endswith(self._boundary.name) for name in names)
        if counts and next(self._reached) == self._boundary.number:
            self._strike()
