"""torch's own threads, which are off while a pool of ours computes."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_before: int | None = None


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Switch torch's intra-op threads off while our own pool computes, and back on afterwards.

    torch is not imported for it. What imports torch inside calls `hold_torch`.
    """
    global _inside, _before  # noqa: PLW0603 - torch's setting is the process's, too
    _inside += 1
    if "torch" in sys.modules:
        hold_torch()
    try:
        yield
    finally:
        _inside -= 1
        if not _inside and _before is not None:
            import torch  # noqa: PLC0415 - it is there

            torch.set_num_threads(_before)
            _before = None


def hold_torch() -> None:
    """Within `single_threaded_torch`, see that it holds for a torch that may have been imported meanwhile."""
    global _before  # noqa: PLW0603
    if not _inside or _before is not None:
        return
    import torch  # noqa: PLC0415 - the caller uses it

    with _lock:
        if _before is None:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
