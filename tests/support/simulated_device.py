"""A device beside the CPU without one: as strict as a GPU about where tensors are, later than one, and rounding as one.

Its tensors say that they are on another device and keep their numbers in host memory that nothing else reaches:

- an operation that mixes them with the CPU's raises, but for copies and for single numbers, as on a GPU; so do numpy
  and compiled loops, which a GPU's tensors cannot be given to;
- lanes copy at the last moment: when somebody waits for a mark behind the copy. Who reads what was copied without
  waiting, or fills a buffer again before it was copied, gets wrong numbers;
- it has only so many bytes;
- what GPUs are known to round otherwise than CPUs do is rounded otherwise: division by a plain number, which is a
  multiplication by its reciprocal there; sums, which are added in another order; exponentials and similar functions.

Factories (``torch.empty(..., device=...)``) work in threads that have entered a lane, as they do under CUDA's streams.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_aten = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default}
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}


@functools.cache
def here() -> torch.device:
    """What its tensors say they are on. Made known to torch at the first call."""
    _setup_privateuseone_for_python_backend("simulated")
    return torch.device("simulated", 0)


class Memory:
    """Bytes in use, by storage; and how often somebody waited to know what is in them."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_waits = 0
        self.used_bytes = self.peak_bytes = 0
        self._users: dict[int, list[int]] = {}
        self._lock = threading.RLock()

    def hold(self, tensor: DeviceTensor, data: torch.Tensor) -> None:
        place, size = data.untyped_storage().data_ptr(), data.untyped_storage().nbytes()
        if not size:
            return
        with self._lock:
            if place not in self._users:
                if self.used_bytes + size > self.capacity_bytes:
                    raise torch.OutOfMemoryError(f"{size} bytes asked for, {self.used_bytes} are in use")
                self._users[place] = [0, size]
                self.used_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self._users[place][0] += 1
        weakref.finalize(tensor, self._release, place, data.untyped_storage())

    def _release(self, place: int, storage: object) -> None:
        del storage  # was kept until now, so that nothing else can have come to its place
        with self._lock:
            self._users[place][0] -= 1
            if not self._users[place][0]:
                self.used_bytes -= self._users.pop(place)[1]


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device."""

    data_here: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, data: torch.Tensor, memory: Memory) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device=here()
        )
        made.data_here, made.memory = data, memory
        memory.hold(made, data)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        self.memory.num_waits += 1
        return self.data_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {}, None)


class Mode(TorchDispatchMode):
    """Makes what is asked for on the device; everything else is as always."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {}, self.memory)


def dispatch(function: Any, args: Any, kwargs: dict[str, Any], memory: Memory | None) -> Any:
    leaves, shape = tree_flatten((args, kwargs))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    ours = [x for x in given if isinstance(x, DeviceTensor)]
    wanted = kwargs.get("device")
    is_made_here = wanted is not None and torch.device(wanted).type == here().type
    if not ours and not is_made_here:
        return function(*args, **kwargs)
    strangers = [x for x in given if not isinstance(x, DeviceTensor) and x.dim()]
    if ours and strangers and function not in _CROSSING:
        raise RuntimeError(f"{function} is given tensors of {here()} and of the CPU")
    memory = ours[0].memory if ours else memory
    assert memory is not None
    args, kwargs = tree_unflatten([x.data_here if isinstance(x, DeviceTensor) else x for x in leaves], shape)
    if is_made_here:
        kwargs = kwargs | {"device": torch.device("cpu")}
    leaves_here = function in _CROSSING and not is_made_here and not isinstance(leaves[0], DeviceTensor)
    memory.num_waits += function in _WAITING or leaves_here or (wanted is not None and not is_made_here)
    result = as_gpus_round(function, args, kwargs)
    if function is _aten._to_copy.default and wanted is not None and (not is_made_here or not ours):
        result = result.clone()  # no storage is shared across devices
        return DeviceTensor(result, memory) if is_made_here else result
    if function is _aten.copy_.default and not isinstance(leaves[0], DeviceTensor):
        return leaves[0]
    # What was changed in place is the tensor that was given.
    known = {id(x.data_here): x for x in ours}
    found, shape = tree_flatten(result)

    def of_here(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else DeviceTensor(x, memory)

    return tree_unflatten([of_here(x) for x in found], shape)


_IMPRECISE = {"exp", "log", "log1p", "sin", "cos", "acos"}


def as_gpus_round(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with the last bits of a GPU."""
    name = function.overloadpacket.__name__
    plain = name.rstrip("_")
    x = args[0] if args else None
    if plain == "div" and "rounding_mode" not in kwargs and not isinstance(args[1], torch.Tensor):
        reciprocal = (torch.ones((), dtype=x.dtype) / args[1]).item()
        return (_aten.mul_ if name == "div_" else _aten.mul)(x, reciprocal)
    if plain == "sum" and isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
        return function(x.flip(list(range(x.dim()))), *args[1:], **kwargs).flip(_flipped(x, args, kwargs))
    if plain in _IMPRECISE:
        result = function(*args, **kwargs)
        up = torch.arange(result.numel()).view(result.shape) % 2 == 0
        return result.copy_(torch.where(up, torch.nextafter(result, torch.full_like(result, torch.inf)), result))
    return function(*args, **kwargs)


def _flipped(x: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> list[int]:
    """Dimensions of a sum that were turned round before it, and are still there."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    return [] if not dims else list(range(x.dim() - len(dims)))


class SimulatedMark:
    def __init__(self, lane: SimulatedLane, place: int) -> None:
        self._lane, self._place = lane, place

    def wait(self) -> None:
        self._lane.run_to(self._place)


class SimulatedLane:
    """Work that is done when it must be.

    Arithmetic cannot be put off here: its lane is eager, and is done with all it was given, and waited for, at once.
    """

    def __init__(self, memory: Memory, *, is_eager: bool) -> None:
        self._memory, self._is_eager = memory, is_eager
        self._work: deque[Callable[[], object]] = deque()
        self._num_given = self._num_done = 0
        self._lock = threading.RLock()
        self._modes: dict[int, list[Mode]] = {}
        self.lent: weakref.WeakSet[DeviceTensor] = weakref.WeakSet()

    def __enter__(self) -> Self:
        mode = Mode(self._memory)
        mode.__enter__()
        self._modes.setdefault(threading.get_ident(), []).append(mode)
        return self

    def __exit__(self, *args: object) -> None:
        self._modes[threading.get_ident()].pop().__exit__(*args)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert (target.dtype, target.shape) == (source.dtype, source.shape)
        assert isinstance(target, DeviceTensor) != isinstance(source, DeviceTensor)
        if isinstance(source, DeviceTensor):
            assert any(lent is source for lent in self.lent), "memory of another lane that was not lent to this one"
        into, out_of = (x.data_here if isinstance(x, DeviceTensor) else x for x in (target, source))
        self._give(lambda: into.copy_(out_of))

    def mark(self) -> SimulatedMark:
        return SimulatedMark(self, self._num_given)

    def wait(self, mark: SimulatedMark) -> None:
        self._give(mark.wait)

    def _give(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._work.append(work)
            self._num_given += 1
        if self._is_eager:
            self.run_to(self._num_given)

    def run_to(self, place: int) -> None:
        with self._lock:
            while self._num_done < place:
                self._num_done += 1
                self._work.popleft()()


class SimulatedDevice:
    """See `mergekit_ray.evaluation.device.protocol.Device`.

    Args:
        capacity_bytes: of its memory.
    """

    name = "the simulated device"

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self.torch_device = here()
        self.memory = Memory(capacity_bytes)
        self.uploads, self.downloads = (SimulatedLane(self.memory, is_eager=False) for _ in range(2))
        self.compute = SimulatedLane(self.memory, is_eager=True)
        self.num_made_room = 0

    def free_bytes(self) -> int:
        return self.memory.capacity_bytes - self.memory.used_bytes

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def lend(self, tensor: torch.Tensor, lane: SimulatedLane) -> None:
        assert isinstance(tensor, DeviceTensor)
        lane.lent.add(tensor)

    def give_back_unused(self) -> None:
        self.num_made_room += 1
        gc.collect()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)
