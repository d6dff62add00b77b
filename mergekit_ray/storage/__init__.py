"""Where checkpoints are: disks, S3, the Hugging Face Hub. One room or file for each scheme, behind `protocols`."""

from mergekit_ray.storage.opening import open_sink, open_source
from mergekit_ray.storage.protocols import FileStat, Sink, Source, Upload, WritableBuffer

__all__ = ["FileStat", "Sink", "Source", "Upload", "WritableBuffer", "open_sink", "open_source"]
