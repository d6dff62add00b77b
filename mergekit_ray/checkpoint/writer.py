"""Streaming one shard into its file, hashing on the way."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from mergekit_ray.core.errors import InternalError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord, tensor_digest
from mergekit_ray.storage.protocols import Sink

_INLINE_BYTES = 64 << 10
"""Below this, handing the bytes to another thread costs more than hashing them."""


class ShardWriter:
    """Writes one safetensors file front to back.

    The header is written at once; then the tensors' bytes come in file order, cut as the caller likes. The file is
    hashed on a thread of its own while the bytes are stored. As a context manager it aborts unless `finish` was
    reached.

    Args:
        sink: where the file goes.
        shard: its name, header and tensors.

    Raises:
        StorageError: the store refuses it.
    """

    def __init__(self, sink: Sink, shard: Shard) -> None:
        self._shard = shard
        self._where = f"{sink.uri}/{shard.file}"
        self._file_hash = hashlib.sha256()
        self._tensor_hash = tensor_digest()
        self._digests: dict[str, str] = {}
        self._num_digested = 0
        self._num_written = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._upload = sink.open(shard.file, shard.num_bytes)
        try:
            self._file_hash.update(shard.header)
            self._upload.write(shard.header)
            self._end_tensors()
        except BaseException:
            self.abort()
            raise

    def write(self, data: memoryview | bytes) -> None:
        """Append tensor data. ``data`` may be reused as soon as this returns.

        Raises:
            InternalError: there is more data than the plan has tensors for.
            StorageError: the store failed.
        """
        view = memoryview(data).cast("B")
        if len(self._shard.header) + self._num_written + len(view) > self._shard.num_bytes:
            raise self._wrong_size(self._num_written + len(view))
        if len(view) < _INLINE_BYTES:
            self._file_hash.update(view)
            self._hash_tensors(view)
            self._upload.write(view)
            return
        hashing: Future[None] = self._hasher.submit(self._file_hash.update, view)
        try:
            self._hash_tensors(view)
            self._upload.write(view)
        finally:
            hashing.result()  # not later: the caller may fill the buffer again

    def finish(self) -> ShardRecord:
        """Commit the file.

        Returns:
            Its size and digests.

        Raises:
            InternalError: some of the planned bytes have not come.
            StorageError: the store failed.
        """
        if len(self._shard.header) + self._num_written != self._shard.num_bytes:
            raise self._wrong_size(self._num_written)
        stat = self._upload.commit()
        self._hasher.shutdown()
        return ShardRecord(
            file=self._shard.file,
            num_bytes=stat.num_bytes,
            sha256=self._file_hash.hexdigest(),
            tensors=self._digests,
            version=stat.version,
        )

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after `finish`; safe to call twice."""
        self._upload.abort()
        self._hasher.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def _hash_tensors(self, view: memoryview) -> None:
        """Hash tensor by tensor and advance."""
        while view:
            tensor = self._shard.tensors[self._num_digested]
            part = view[: tensor.end - self._num_written]
            self._tensor_hash.update(part)
            self._num_written += len(part)
            view = view[len(part) :]
            self._end_tensors()

    def _end_tensors(self) -> None:
        """Note the digest of the tensor that has just ended, and of the empty ones that follow it."""
        tensors = self._shard.tensors
        while self._num_digested < len(tensors) and tensors[self._num_digested].end == self._num_written:
            self._digests[tensors[self._num_digested].spec.name] = self._tensor_hash.hexdigest()
            self._tensor_hash = tensor_digest()
            self._num_digested += 1

    def _wrong_size(self, num_bytes: int) -> InternalError:
        planned = self._shard.num_bytes - len(self._shard.header)
        return InternalError(
            f"{num_bytes} bytes of tensor data came where the plan has {planned}",
            where=self._where,
            remedy="this is a fault in mergekit-ray: please report it with the recipe",
        )
