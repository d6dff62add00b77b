"""Merge methods: one file per method or family, found by `mergekit_ray.core.registry.METHODS`.

No module here imports torch when it is imported, so that recipes are checked and planned without it.
"""
