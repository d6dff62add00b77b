"""Where checkpoints are: disks, S3, the Hugging Face Hub. One room or file for each scheme, behind `protocols`."""

from mergekit_ray.storage.opening import open_sink, open_source

__all__ = ["open_sink", "open_source"]
