"""Folders of a disk."""

from mergekit_ray.storage.local import store as store  # registers the scheme
