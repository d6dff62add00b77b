"""Merge methods: one file for each method or family.

The registry `mergekit_ray.core.registry.METHODS` finds them. What they share is in `shared`, loops are in `compiled`.

No module here imports torch when it is imported, so that recipes are checked and planned without it.
"""
