"""Stores of checkpoints: one scheme per file, all behind the protocols of `mergekit_ray.storage.protocols`."""

from mergekit_ray.storage.opening import open_sink, open_source
from mergekit_ray.storage.protocols import FileStat, Sink, Source, Upload, WritableBuffer

__all__ = ["FileStat", "Sink", "Source", "Upload", "WritableBuffer", "open_sink", "open_source"]
