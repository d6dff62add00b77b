"""Routers made from prompts are kept beside an unfinished mixture, so that they are the same however often it resumes.

Their last bits depend on the processor that computes them. ``.mergekit-ray/<plan digest>/routers.json`` is written
before any shard. A rerun reads it instead of computing them again, even on another kind of machine. It is deleted with
the records.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.output.destination import Destination
from mergekit_ray.planning.moe.experts import RouterVectors
from mergekit_ray.reporting.reporters import Reporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUTERS_FILE: Final = "routers.json"
_MAX_BYTES: Final = 2 << 30
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """`RouterVectors` as they were read."""

    vectors: Mapping[int, NDArray[np.float32]]
    shared: Mapping[int, NDArray[np.float32]]
    lengths: Mapping[int, float]
    warnings: Sequence[str]


class KeptRouters:
    """The routers of a plan, as they are beside its unfinished output or were made for it.

    Args:
        digest: of the plan.
        tell: told of what cannot be used.
    """

    def __init__(self, digest: str, tell: Reporter) -> None:
        self._digest = digest
        self._tell = tell
        self._routers: RouterVectors | None = None
        self._data: bytes | None = None
        self._there: bytes | None = None

    def look(self, found: Destination) -> bool:
        """Read what is at the output; whether these are other routers than those that are held.

        Raises:
            StorageError: the store failed.
        """
        prefix = f"{found.staging}/" if found.staging else ""
        name = f"{prefix}{found.record_folder}/{ROUTERS_FILE}"
        try:
            data = found.sink.read(name, max_bytes=_MAX_BYTES) if found.sink.stat(name) is not None else None
        except CheckpointError:  # gone meanwhile, or too large to be ours
            data = None
        if data == self._there:
            return False
        self._there = data
        if data is None or data == self._data:
            return False
        try:
            self._routers, self._data = from_bytes(data, self._digest), data
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._reject(str(error))
            return False
        return True

    def plan_with(self, plan: Callable[[Callable[[], RouterVectors]], Any], make: Callable[[], RouterVectors]) -> Any:
        """What ``plan`` gives with the routers that are kept, or else with those that ``make`` gives, to be kept."""
        if self._routers is not None:
            kept = self._routers
            try:
                return plan(lambda: kept)
            except (ValueError, KeyError) as error:
                self._reject(f"they do not fit the plan: {error}")

        def made() -> RouterVectors:
            routers = make()
            self._routers, self._data = routers, to_bytes(routers, self._digest)
            return routers

        return plan(made)

    def write(self, destination: Destination) -> None:
        """Keep the routers at the place where the model is made. The caller holds the output's lease.

        Raises:
            StorageError: the store failed.
        """
        if self._data is not None and self._data != self._there:
            destination.sink.put(f"{destination.record_folder}/{ROUTERS_FILE}", self._data)

    def _reject(self, why: str) -> None:
        self._routers = self._data = None
        self._tell.event(
            "warning",
            f"the routers that an earlier run kept cannot be used, and are computed again ({ROUTERS_FILE}: {why})",
        )


def to_bytes(routers: RouterVectors, digest: str) -> bytes:
    """The file: routers as base64 of little-endian float32, with their shapes; ``digest`` is the plan's."""
    content = {
        "vectors": {str(layer): _to_json(rows) for layer, rows in routers.vectors.items()},
        "shared": {str(layer): _to_json(rows) for layer, rows in routers.shared.items()},
        "lengths": {str(layer): float(length) for layer, length in routers.lengths.items()},
        "warnings": list(routers.warnings),
    }
    head = {"format": _FORMAT, "plan_digest": digest, "sha256": _sha256(content)}
    return json.dumps({**head, "routers": content}).encode()


def from_bytes(data: bytes, digest: str) -> Kept:
    """Inverse of `to_bytes`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: not such a file, damaged, of another plan, or
            with values that are not finite.
    """
    import numpy as np  # noqa: PLC0415 - only where there is something to read

    found = json.loads(data)
    if found["format"] != _FORMAT:
        raise ValueError(f"format {found['format']!r}")
    if found["plan_digest"] != digest:
        raise ValueError("of another plan")
    content = found["routers"]
    if found["sha256"] != _sha256(content):
        raise ValueError("damaged")
    by_layer = [
        {int(layer): _from_json(rows) for layer, rows in content[name].items()} for name in ("vectors", "shared")
    ]
    lengths = {int(layer): float(length) for layer, length in content["lengths"].items()}
    values = [*by_layer[0].values(), *by_layer[1].values(), *map(np.asarray, lengths.values())]
    if not all(np.isfinite(each).all() for each in values):
        raise ValueError("not finite")
    return Kept(by_layer[0], by_layer[1], lengths, [str(line) for line in content["warnings"]])


def _to_json(rows: NDArray[np.float32]) -> list[Any]:
    return [list(rows.shape), base64.b64encode(rows.astype("<f4").tobytes()).decode("ascii")]


def _from_json(data: list[Any]) -> NDArray[np.float32]:
    import numpy as np  # noqa: PLC0415

    shape, text = data
    rows: NDArray[np.float32] = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    return rows.reshape([int(size) for size in shape])


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
