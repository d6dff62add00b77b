"""The tree that computes one output tensor.

A plan holds one expression per output tensor. Nodes are plain frozen data: they name methods and files, they never hold
weights. Every node knows the spec of its result and what must be read for any run of it.

    Load(model, spec, location)          bytes as they are
    Cast(x, dtype)                       one rounding
    Scale(x, factor, ...)                x * factor
    Merge(method, spec, inputs, ...)     a merge method over several tensors
    LowRank(x, a, b, scale, ...)         x + scale * (b @ a): a LoRA
    ExpertLowRank(x, a, b, scale, ...)   the same for each expert of a layer
    LowRankFactors(x, rank, ...)         the best b and a for a matrix    SingularValues(x)
    Noise(x, distribution, scale, key)   x plus random numbers that are a function of key and index
    Constant(spec, value)   Literal(spec, values)   Concat(parts, spec)
    BlockScaled(codes, scales, block)    8-bit floats times the scale of their block
    Mxfp4(blocks, scales, name)          4-bit floats in groups that share an exponent

A new kind is one module here (imported below, so that plans can be read back) and one of the same name in
`evaluation.nodes`.
"""

from mergekit_ray.core.expressions.arithmetic import Cast, Merge, Scale
from mergekit_ray.core.expressions.base import (
    Expression,
    Load,
    Scalar,
    from_json,
    is_copy,
    loads,
    spec_from_json,
    spec_to_json,
    to_json,
)
from mergekit_ray.core.expressions.expert_low_rank import ExpertLowRank
from mergekit_ray.core.expressions.factors import NUM_NORMS, LowRankFactors, SingularValues
from mergekit_ray.core.expressions.generated import Concat, Constant, Literal, Noise, without_values
from mergekit_ray.core.expressions.low_rank import LowRank
from mergekit_ray.core.expressions.quantised import BlockScaled, Mxfp4

__all__ = [
    "NUM_NORMS",
    "BlockScaled",
    "Cast",
    "Concat",
    "Constant",
    "ExpertLowRank",
    "Expression",
    "Literal",
    "Load",
    "LowRank",
    "LowRankFactors",
    "Merge",
    "Mxfp4",
    "Noise",
    "Scalar",
    "Scale",
    "SingularValues",
    "from_json",
    "is_copy",
    "loads",
    "spec_from_json",
    "spec_to_json",
    "to_json",
    "without_values",
]
