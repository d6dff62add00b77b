"""One file being written to the Hub: collected in a temporary file, then committed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from mergekit_ray.storage.faults import wrong_size
from mergekit_ray.storage.hub.branch import WorkingBranch
from mergekit_ray.storage.local.upload import local_fault
from mergekit_ray.storage.protocols import FileStat


class HubUpload:
    """See `mergekit_ray.storage.protocols.Upload`.

    huggingface_hub uploads files and buffers, not what is still being made: it reads all of it before it sends any. So
    the file is collected in the folder for temporary files (TMPDIR), which needs room for one shard of each worker of
    this machine, and removed when it is committed or aborted. A process that is killed leaves it there.

    Args:
        branch: to commit to.
        name: of the file.
        num_bytes: that will be written.
        committed: told the name when it is there.
        guard: see `GuardedSink.guarded`; None for none.
    """

    def __init__(
        self,
        branch: WorkingBranch,
        name: str,
        num_bytes: int,
        committed: Callable[[str], None],
        guard: Callable[[], None] | None = None,
    ) -> None:
        self._guard = guard
        self._branch = branch
        self._committed = committed
        self._name = name
        self._num_bytes = num_bytes
        self._num_written = 0
        self._where = f"hf://{branch.name}/{name}"
        try:
            self._file = tempfile.NamedTemporaryFile(prefix="mergekit-ray-", delete=False)  # noqa: SIM115 - see abort
        except OSError as error:
            raise local_fault(error, Path(tempfile.gettempdir()), num_bytes) from error
        self._closed = False

    def write(self, data: memoryview | bytes) -> None:
        """See `Upload.write`.

        Raises:
            StorageError: the disk is full, or more bytes come than were announced.
        """
        if self._closed:
            raise ValueError(f"{self._where} is already committed or aborted")
        num_bytes = memoryview(data).nbytes
        if self._num_written + num_bytes > self._num_bytes:
            raise wrong_size(self._num_written + num_bytes, self._num_bytes, self._where)
        try:
            self._file.write(data)
        except OSError as error:
            raise local_fault(error, Path(self._file.name), self._num_bytes) from error
        self._num_written += num_bytes

    def commit(self) -> FileStat:
        """See `Upload.commit`. All of the upload happens here."""
        if self._closed:
            raise ValueError(f"{self._where} is already committed or aborted")
        if self._num_written != self._num_bytes:
            raise wrong_size(self._num_written, self._num_bytes, self._where)
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        try:
            self._file.close()
        except OSError as error:
            raise local_fault(error, Path(self._file.name), self._num_bytes) from error
        self._branch.make()
        operation = CommitOperationAdd(self._name, self._file.name)
        self._branch.commit_guarded([operation], f"Add {self._name}", self._guard)
        self._close()
        self._committed(self._name)
        return self._branch.stat(self._name)

    def abort(self) -> None:
        """See `Upload.abort`."""
        if not self._closed:
            self._close()

    def _close(self) -> None:
        self._closed = True
        try:
            self._file.close()
        finally:
            Path(self._file.name).unlink(missing_ok=True)
