"""Pickles as data: a machine that knows the few instructions and names that ``torch.save`` uses for tensors.

Nothing is imported or called: a global is its name, and the names in `_MAKES` make data of this module. Every other
name, and every other instruction, is an error that names it.

Source: Python's documentation of pickletools for the instructions; what ``torch.save`` was seen to write for the names.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError

Saved: TypeAlias = Any
"""Numbers, texts, None, tuples, lists, dictionaries, `Tensor`, and what has no meaning here: `Name`, `Storage`."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global that a pickle names: ``torch.FloatStorage``."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in a record of the archive.

    Attributes:
        kind: its class as the pickle names it.
        key: of the record.
        count: elements; of an ``UntypedStorage`` bytes.
    """

    kind: Name
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """Elements of a storage.

    Attributes:
        storage: that it is in.
        offset: its first element there.
        shape, stride: in elements.
        dtype: where the storage has none.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Name | None = None


class UnknownError(Exception):
    """The pickle does what it need not do to hold tensors."""


_MARK: Final = object()
_MAX_RANK: Final = 64
_MAX_NUMBER: Final = 1 << 64
_MAX_KEY: Final = 1 << 32
"""Of larger numbers many can have one hash, so that a dictionary of them is slow."""

_MAX_INSTRUCTIONS: Final = 20_000_000
"""A tensor takes some forty."""

STORAGES: Final[Mapping[str, DType]] = {
    "torch.FloatStorage": DType.F32,
    "torch.HalfStorage": DType.F16,
    "torch.BFloat16Storage": DType.BF16,
    "torch.DoubleStorage": DType.F64,
    "torch.LongStorage": DType.I64,
    "torch.IntStorage": DType.I32,
    "torch.ShortStorage": DType.I16,
    "torch.CharStorage": DType.I8,
    "torch.ByteStorage": DType.U8,
    "torch.BoolStorage": DType.BOOL,
}
"""Dtypes of storages by their class."""

UNTYPED: Final = "torch.storage.UntypedStorage"

DTYPES: Final[Mapping[str, DType]] = {f"torch.{dtype.config_name}": dtype for dtype in DType}
"""Dtypes by torch's name."""

_OTHER_KINDS: Final = frozenset(
    f"torch.{kind}Storage"
    for kind in ("ComplexFloat", "ComplexDouble", "QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")
)
_OTHER_DTYPES: Final = frozenset(
    f"torch.{name}"
    for name in (
        "complex32",
        "complex64",
        "complex128",
        "qint8",
        "qint32",
        "quint8",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
    )
)
"""Known so that the tensor can be named which has them."""


def _tensor(storage: Saved, offset: Saved, shape: Saved, stride: Saved, *_: Saved) -> Tensor:
    if not (isinstance(storage, Storage) and _is_count(offset) and _are_counts(shape) and _are_counts(stride)):
        raise UnknownError("a tensor is made of something else than a storage, an offset, a shape and strides")
    if len(shape) != len(stride):
        raise UnknownError("a tensor's shape and strides are of different lengths")
    return Tensor(storage, offset, shape, stride)


def _tensor_with_dtype(*arguments: Saved) -> Tensor:
    made = _tensor(*arguments[:4])
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, Name):
        raise UnknownError("a tensor has no dtype")
    return Tensor(made.storage, made.offset, made.shape, made.stride, dtype)


def _parameter(tensor: Saved, *_: Saved) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UnknownError("a parameter is made of something else than a tensor")
    return tensor


def _ordered() -> dict[Saved, Saved]:
    return {}


def _size(sizes: Saved) -> Saved:
    if not _are_counts(sizes):
        raise UnknownError("a torch.Size is made of something else than sizes")
    return sizes


_MAKES: Final[Mapping[str, Callable[..., Saved]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
}
"""What may be called, and what it makes here."""

_KNOWN: Final = frozenset({*_MAKES, *STORAGES, *DTYPES, UNTYPED, *_OTHER_KINDS, *_OTHER_DTYPES})


def read_pickle(data: bytes, where: str) -> Saved:
    """What a pickle holds.

    Args:
        data: the pickle.
        where: the file, for messages.

    Raises:
        CheckpointError: it is malformed, or holds more than tensors, numbers and texts; names what.
    """
    try:
        return _Machine().run(data)
    except UnknownError as error:
        raise CheckpointError(
            f"the pickle cannot be read as data: {error}",
            where=where,
            remedy="it may run code when it is loaded. If you trust it, load it and save its tensors with "
            "`safetensors.torch.save_file`",
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"the pickle is malformed: {type(error).__name__}",
            where=where,
            remedy="the file is damaged or incomplete: download or copy it again",
        ) from error


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Saved] = []
        self._memo: dict[int, Saved] = {}

    def run(self, data: bytes) -> Saved:
        stream = io.BytesIO(data)
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_INSTRUCTIONS:
                raise UnknownError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
            if code.name == "STOP":
                (result,) = self._stack
                return result
            step = _STEPS.get(code.name)
            if step is None:
                raise UnknownError(f"it uses the instruction {code.name}")
            step(self, argument)
        raise ValueError("it has no end")

    def push(self, value: Saved) -> None:
        self._stack.append(value)

    def number(self, value: int) -> None:
        if abs(value) >= _MAX_NUMBER:
            raise UnknownError("it has a number of more than 64 bits")
        self.push(value)

    def pop(self) -> Saved:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def since_mark(self) -> list[Saved]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                found = self._stack[place + 1 :]
                del self._stack[place:]
                return found
        raise ValueError("no mark")

    @property
    def top(self) -> Saved:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def memorise(self, place: int) -> None:
        self._memo[place] = self.top

    def memorise_next(self, _: object) -> None:
        self._memo[len(self._memo)] = self.top

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    def named(self, text: str) -> None:
        module, _, name = text.partition(" ")
        self._push_name(module, name)

    def named_by_stack(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise UnknownError("it names a global by something else than texts")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if str(found) not in _KNOWN:
            raise UnknownError(f"it refers to {str(found)[:200]!a}")
        self.push(found)

    def call(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        make = _MAKES.get(str(function)) if isinstance(function, Name) else None
        if make is None or not isinstance(arguments, tuple):
            raise UnknownError(
                f"it calls {str(function)[:200]!a}" if isinstance(function, Name) else "it calls a value"
            )
        self.push(make(*arguments))

    def build(self, _: object) -> None:
        """The attributes of an ``OrderedDict``, such as the versions of modules, say nothing of tensors."""
        self.pop()
        if not isinstance(self.top, dict):
            raise UnknownError("it sets attributes of something else than an OrderedDict")

    def persistent(self, _: object) -> None:
        match self.pop():
            case ("storage", Name() as kind, str(key), str(), int(count)) if count >= 0:
                if str(kind) not in STORAGES and str(kind) not in _OTHER_KINDS and str(kind) != UNTYPED:
                    raise UnknownError(f"it has a storage of class {kind}")
                self.push(Storage(kind, key, count))
            case _:
                raise UnknownError("it refers to something else than a storage")

    def to_tuple(self, count: int | None) -> None:
        self.push(tuple(self.since_mark()) if count is None else tuple(self.pop() for _ in range(count))[::-1])

    def append(self, _: object) -> None:
        self._extend([self.pop()])

    def appends(self, _: object) -> None:
        self._extend(self.since_mark())

    def _extend(self, values: list[Saved]) -> None:
        if not isinstance(self.top, list):
            raise UnknownError("it appends to something else than a list")
        self.top.extend(values)

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def set_items(self, _: object) -> None:
        self._update(self.since_mark())

    def _update(self, flat: list[Saved]) -> None:
        if not isinstance(self.top, dict) or len(flat) % 2:
            raise UnknownError("it sets items of something else than a dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            _set(self.top, key, value)


def _set(into: dict[Saved, Saved], key: Saved, value: Saved) -> None:
    if not (isinstance(key, str) or (type(key) is int and abs(key) < _MAX_KEY)):
        raise UnknownError("a dictionary's key is neither a text nor a small number")
    into[key] = value


def _is_count(value: Saved) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _are_counts(values: Saved) -> bool:
    return isinstance(values, tuple) and len(values) <= _MAX_RANK and all(map(_is_count, values))


def _constant(value: Saved) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _fresh(make: Callable[[], Saved]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _nothing(machine: _Machine, _: object) -> None:
    del machine


_STEPS: Final[Mapping[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": _constant(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_DICT": _fresh(dict),
    "EMPTY_LIST": _fresh(list),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _Machine.push),
    "LONG1": _Machine.number,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.memorise),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "MEMOIZE": _Machine.memorise_next,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_by_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "TUPLE": lambda machine, _: machine.to_tuple(None),
    "TUPLE1": lambda machine, _: machine.to_tuple(1),
    "TUPLE2": lambda machine, _: machine.to_tuple(2),
    "TUPLE3": lambda machine, _: machine.to_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
"""What each instruction does."""
