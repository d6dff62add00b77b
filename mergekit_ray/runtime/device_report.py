"""What a person is told of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_ray.runtime.reporting import Reporter

if TYPE_CHECKING:
    from mergekit_ray.runtime.progress import Progress


class DeviceReporter:
    """Passes all on, and warns once if tensors were computed on the CPU for want of the device's memory.

    Args:
        reporter: who is told.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._has_warned = False

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """See `Reporter.event`."""
        self._reporter.event(kind, message, **fields)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """See `Reporter.progress`."""
        if progress.num_on_cpu and not self._has_warned:
            self._has_warned = True
            self._reporter.event(
                "warning",
                "warning: some tensors need more memory than the device has, and are computed on the CPU "
                "(methods that work on whole tensors)",
            )
        self._reporter.progress(progress, num_done, num_shards)
