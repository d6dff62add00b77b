"""While no worker is up: what keeps them from starting is reported soon, and what can never start is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from mergekit_ray.core.errors import MergekitRayError, PlanError, StorageError
from mergekit_ray.core.sizes import format_bytes

NO_WORKER_SECONDS: Final = 300.0
"""Without any worker until the merge ends."""

TELL_SECONDS: Final = 5.0
"""Without any worker until the reason is reported."""

MAX_DEATHS: Final = 3
"""Times that a worker may die while it starts."""

_LOOK_SECONDS: Final = 2.0

CPU: Final = "CPU"
GPU: Final = "GPU"
MEMORY: Final = "memory"


@dataclass(frozen=True, slots=True)
class Room:
    """What a node has, by Ray's names of resources; memory in bytes.

    Attributes:
        total: with nothing running on it.
        free: now.
    """

    total: Mapping[str, float]
    free: Mapping[str, float]


class Waited(Protocol):
    """What is asked of a Ray cluster here; see `executors.ray_cluster.Cluster`."""

    def rooms(self) -> Sequence[Room]:
        """What each live node has."""
        ...

    def may_grow(self) -> bool:
        """Whether an autoscaler may add nodes."""
        ...

    def restarts(self, handle: Any) -> int:
        """Times that an actor's process was started again."""
        ...


class Waiting:
    """Waiting for the first worker, or for one after all were lost.

    Args:
        cluster: that they are to run on.
        clock: seconds, as `time.monotonic`.
        tell: called with a line about what is lacking.
    """

    def __init__(self, cluster: Waited, clock: Callable[[], float], tell: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._clock = clock
        self._tell = tell
        self._since = clock()
        self._looked: float | None = None
        self._told = ""
        self._was_up = False
        self._deaths: dict[str, int] = {}

    def came_up(self, name: str) -> None:
        """A worker is up."""
        self._was_up = True
        self._deaths.pop(name, None)
        self._has_some()

    def died(self, name: str, error: Exception, names: Iterable[str], num_up: int) -> None:
        """A worker has died while it started, or before it was noticed that it was up.

        Args:
            name: of the worker.
            error: that Ray gives.
            names: of all workers.
            num_up: workers that are up.

        Raises:
            StorageError: it was the third time, and all that are not up die.
        """
        self._deaths[name] = deaths = self._deaths.get(name, 0) + 1
        if deaths < MAX_DEATHS:
            return
        failure = _failure(error)
        if num_up == 0 and (self._deaths.keys() >= set(names) or self._clock() - self._since > TELL_SECONDS):
            raise failure
        if deaths == MAX_DEATHS:
            self._tell(f"{name} cannot start, the others go on: {failure.what}")

    def is_due(self, num_up: int) -> bool:
        """Whether it is time to look what keeps workers from starting; ``num_up`` are up."""
        if num_up:
            self._has_some()
        return num_up == 0 and (self._looked is None or self._clock() - self._looked >= _LOOK_SECONDS)

    def look(self, handles: Sequence[Any], request: Mapping[str, float]) -> None:
        """See how long there has been no worker, and why.

        Args:
            handles: of the workers' actors.
            request: what each worker asks for, by Ray's names of resources.

        Raises:
            PlanError: no node could ever hold a worker, and no autoscaler adds nodes.
            StorageError: there has been no worker for minutes, or their processes die while they start.
        """
        now = self._clock()
        waited = now - self._since
        self._looked = now
        lacking, is_final = shortage(request, self._cluster.rooms())
        if is_final and not self._was_up and not self._cluster.may_grow():
            raise PlanError(
                f"no worker can start: each asks for {describe(request)}; {lacking}",
                where="the Ray cluster",
                remedy=_remedy(request),
            )
        deaths = min((self._cluster.restarts(handle) for handle in handles), default=0)
        if not self._was_up and deaths >= MAX_DEATHS:
            lacking = f"each has died {deaths} times or more while it started, as when Ray kills it for lack of memory"
        if waited > NO_WORKER_SECONDS or (waited > TELL_SECONDS and not self._was_up and deaths >= MAX_DEATHS):
            raise StorageError(
                f"no worker came up within {waited:.0f} s: each asks for {describe(request)}; {lacking}",
                where="the Ray cluster",
                remedy="see `ray status`, the workers' logs and raylet.out on their nodes; ask for less with "
                "`memory_bytes=` and `num_workers=`, or add nodes",
            )
        if waited >= TELL_SECONDS and lacking != self._told:
            self._told = lacking
            self._tell(f"waiting for workers: each asks for {describe(request)}; {lacking}")

    def _has_some(self) -> None:
        self._since, self._looked, self._told = self._clock(), None, ""


def describe(request: Mapping[str, float]) -> str:
    """``4 CPUs, a GPU and 3.00 GB of memory``."""
    parts = [_amount(name, request[name]) for name in (CPU, GPU, MEMORY) if request.get(name)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def shortage(request: Mapping[str, float], rooms: Sequence[Room]) -> tuple[str, bool]:
    """What keeps a worker from starting, in words, and whether no node could ever hold it.

    Args:
        request: what a worker asks for.
        rooms: of the present nodes.
    """
    if not any(room.total.get(CPU, 0) >= 1 for room in rooms):
        return "there is no node to compute on yet", False
    for name, wanted in request.items():
        most = max(room.total.get(name, 0) for room in rooms)
        if most < wanted:
            return f"no node has {'a GPU' if name == GPU else f'more than {_amount(name, most)}'}", True
    able = [room for room in rooms if _holds(room.total, request)]
    if not able:
        return "no node has all of it", True
    if any(_holds(room.free, request) for room in able):
        return "there is room for one, and it is starting", False
    for name, wanted in request.items():
        most = max(room.free.get(name, 0) for room in able)
        if most < wanted:
            return f"no node has more than {_amount(name, most)} free now", False
    return "no node has all of it free now", False


def _holds(has: Mapping[str, float], request: Mapping[str, float]) -> bool:
    return all(has.get(name, 0) >= wanted for name, wanted in request.items())


def _amount(name: str, value: float) -> str:
    if name == MEMORY:
        return f"{format_bytes(value)} of memory"
    return f"a {name}" if name == GPU and value == 1 else f"{value:g} {name}{'' if value == 1 else 's'}"


def _remedy(request: Mapping[str, float]) -> str:
    if request.get(GPU):
        return "pass `device='auto'` or `device='cpu'`, or add nodes that have GPUs"
    return "ask for less with `memory_bytes=` and `num_workers=`, or add larger nodes"


def _failure(error: Exception) -> MergekitRayError:
    """Ray's reason, which is the last line of what it says, without the traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    remedy = "see `ray status` and the workers' logs"
    if "ModuleNotFoundError" in lines[-1] or "ImportError" in lines[-1]:
        remedy = "install the same version of mergekit-ray on all nodes, or ship it with the job (--runtime-env)"
    return StorageError(
        f"workers die while they start: {lines[-1]}", where="the Ray cluster", remedy=remedy, retryable=False
    )
