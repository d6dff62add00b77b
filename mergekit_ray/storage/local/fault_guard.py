"""Mapped files that shrink, or whose disk fails, while their bytes are in use.

The kernel answers an access to such a page with SIGBUS, which ends the process silently. Reading into buffers
instead would give an error, but costs every merge a copy of all its inputs: a fifth of its processor time, measured. So
a signal handler replaces what cannot be read by zeros, notes it, and lets the access go on. The caller asks afterwards
and throws the result away. The handler is machine code of a few instructions that calls
nothing but ``mmap`` and ``sigaction``: no thread can be interrupted where it may not, and the interpreter, whose lock
another thread may hold, takes no part. A fault anywhere else goes to whoever was asked before (as Ray's and Python's
crash reports), or ends the process as ever.

Source: https://man7.org/linux/man-pages/man2/sigaction.2.html, <bits/sigaction.h> and <asm-generic/siginfo.h>.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import signal
import struct
import sys
import weakref
from typing import Any, Final

from mergekit_ray.storage.local.file_system import libc

_NUM_SLOTS: Final = 1 << 16
"""More than Linux lets a process map (``vm.max_map_count``)."""

_MAP_FIXED: Final = 0x10
_SA_SIGINFO: Final = 0x4
_SA_ONSTACK: Final = 0x0800_0000
_SIGACTION_BYTES: Final = 256
"""More than a ``struct sigaction`` takes."""

_FLAGS_AT: Final = 8 + 128
"""Of ``sa_flags`` in it: after the handler and the mask, in every C library on 64 bits."""

_ADDRESS_AT: Final = 16
"""Of ``si_addr`` in a ``siginfo_t``, on 64 bits."""


class Fault:
    """Whether a mapping's bytes could all be read. It outlives the mapping.

    Args:
        guard: of this process.
        mapped: the mapping, at ``address``.
    """

    def __init__(self, guard: _Guard, mapped: mmap.mmap, address: int) -> None:
        self._happened = False
        self._slot: int | None = guard.enter(address, address + len(mapped))
        self._guard = guard
        # The mapping is still there when this is called, but nobody uses it any more.
        weakref.finalize(mapped, self._end).atexit = False

    def _end(self) -> None:
        slot, self._slot = self._slot, None
        assert slot is not None
        self._happened = self._guard.leave(slot)

    @property
    def happened(self) -> bool:
        """Whether zeros were read in the place of bytes that were not there."""
        slot = self._slot
        return self._happened if slot is None else self._guard.is_hit(slot)


def is_guarded() -> bool:
    """Whether this platform's faults can be caught. Elsewhere files are better not mapped."""
    return sys.platform.startswith("linux") and struct.calcsize("P") == 8


def watch(mapped: mmap.mmap, address: int) -> Fault:
    """Catch the faults of a mapping from now on.

    Raises:
        OSError: there are too many.
    """
    return Fault(_guard(), mapped, address)


class _Guard:
    """The handler of this process, and its table: start, end and whether it was hit, of each mapping."""

    def __init__(self) -> None:
        self._table = (ctypes.c_int64 * (3 * _NUM_SLOTS))()
        self._free = list(range(_NUM_SLOTS - 1, -1, -1))
        self._previous = ctypes.create_string_buffer(_SIGACTION_BYTES)
        # The engine owns the code.
        self._engine, handler = _compile(ctypes.addressof(self._table), ctypes.addressof(self._previous))
        action = ctypes.create_string_buffer(_SIGACTION_BYTES)
        struct.pack_into("=Q", action, 0, handler)
        struct.pack_into("=i", action, _FLAGS_AT, _SA_SIGINFO | _SA_ONSTACK)
        if libc().sigaction(ctypes.c_int(signal.SIGBUS), action, self._previous) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def enter(self, start: int, end: int) -> int:
        try:
            slot = self._free.pop()
        except IndexError:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
        self._table[3 * slot + 2] = 0
        self._table[3 * slot] = start
        self._table[3 * slot + 1] = end
        return slot

    def leave(self, slot: int) -> bool:
        hit = self.is_hit(slot)
        self._table[3 * slot + 1] = 0
        self._free.append(slot)
        return hit

    def is_hit(self, slot: int) -> bool:
        return bool(self._table[3 * slot + 2])


@functools.cache
def _guard() -> _Guard:
    return _Guard()


def _compile(table: int, previous: int) -> tuple[Any, int]:
    """The handler's code, and its address.

    It looks for the mapping that the address belongs to, marks it, and maps zeros over the rest of it, once for all
    its pages. If there is none, what was set before takes over, when the access is tried again.
    """
    from llvmlite import binding, ir  # noqa: PLC0415 - a tenth of a second, once something is mapped

    i32, i64 = ir.IntType(32), ir.IntType(64)
    module = ir.Module("fault_guard")
    handler = ir.Function(module, ir.FunctionType(ir.VoidType(), [i32, i64, i64]), "handle")
    number, info, _ = handler.args
    entry, loop, body, within, following, other, done = (
        handler.append_basic_block(name) for name in ("entry", "loop", "body", "within", "following", "other", "done")
    )

    def field(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, i64.as_pointer())

    def function(builder: Any, name: str, kind: ir.FunctionType) -> Any:
        address = ctypes.cast(getattr(libc(), name), ctypes.c_void_p).value
        return builder.inttoptr(i64(address), kind.as_pointer())

    builder = ir.IRBuilder(entry)
    fault = builder.load(field(builder, builder.add(info, i64(_ADDRESS_AT))))
    builder.branch(loop)

    builder.position_at_end(loop)
    row = builder.phi(i64)
    row.add_incoming(i64(table), entry)
    builder.cbranch(builder.icmp_unsigned("<", row, i64(table + _NUM_SLOTS * 24)), body, other)

    builder.position_at_end(body)
    start = builder.load(field(builder, row))
    end = builder.load(field(builder, builder.add(row, i64(8))))
    row.add_incoming(builder.add(row, i64(24)), following)
    inside = builder.and_(builder.icmp_unsigned("<=", start, fault), builder.icmp_unsigned("<", fault, end))
    builder.cbranch(inside, within, following)

    builder.position_at_end(following)
    builder.branch(loop)

    builder.position_at_end(within)
    builder.store(i64(1), field(builder, builder.add(row, i64(16))))
    page = builder.and_(fault, i64(-mmap.PAGESIZE))
    arguments = [
        *(page, builder.sub(end, page), i32(mmap.PROT_READ | mmap.PROT_WRITE)),
        *(i32(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED), i32(-1), i64(0)),
    ]
    kind = ir.FunctionType(i64, [i64, i64, i32, i32, i32, i64])
    mapped = builder.call(function(builder, "mmap", kind), arguments)
    builder.cbranch(builder.icmp_unsigned("==", mapped, page), done, other)

    builder.position_at_end(other)
    kind = ir.FunctionType(i32, [i32, i64, i64])
    builder.call(function(builder, "sigaction", kind), [number, i64(previous), i64(0)])
    builder.branch(done)

    builder.position_at_end(done)
    builder.ret_void()

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine, engine.get_function_address("handle")
