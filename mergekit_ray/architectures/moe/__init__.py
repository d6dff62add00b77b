"""Families of Mixture-of-Experts models: what their tensors are called and what their ``config.json`` says.

One module for each family, found by the registry in `mergekit_ray.architectures.moe.registry`.
"""
