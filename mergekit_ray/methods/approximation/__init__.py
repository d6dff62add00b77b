"""Rows of an embedding for tokens that the model does not have: one file for each method or family.

The registry `mergekit_ray.core.approximation.APPROXIMATIONS` finds them. No module here imports torch or numba when it
is imported.
"""
