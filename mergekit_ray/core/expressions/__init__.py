"""The tree that computes one output tensor.

A plan holds one expression per output tensor. Nodes are plain frozen data: they name methods and files, they never hold
weights. Every node knows the spec of its result and what must be read for any run of it.

    Load(model, spec, location)          bytes as they are
    Cast(x, dtype)                       one rounding
    Scale(x, factor, ...)                x * factor
    Merge(method, spec, inputs, ...)     a merge method over several tensors

A new kind is one module here (imported below, so that plans can be read back) and one node in `runtime.nodes`.
"""

from mergekit_ray.core.expressions.arithmetic import Cast, Merge, Scale
from mergekit_ray.core.expressions.base import (
    KINDS,
    Expression,
    Scalar,
    expression_kind,
    from_json,
    spec_from_json,
    spec_to_json,
    to_json,
)
from mergekit_ray.core.expressions.load import Load, is_copy, loads

__all__ = [
    "KINDS",
    "Cast",
    "Expression",
    "Load",
    "Merge",
    "Scalar",
    "Scale",
    "expression_kind",
    "from_json",
    "is_copy",
    "loads",
    "spec_from_json",
    "spec_to_json",
    "to_json",
]
