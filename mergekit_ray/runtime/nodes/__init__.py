"""Nodes evaluate expressions: one class for each kind, found by its registration when this package is imported."""

from mergekit_ray.runtime.nodes import arithmetic, factors, generated, low_rank, merge, quantised

__all__ = ["arithmetic", "factors", "generated", "low_rank", "merge", "quantised"]
