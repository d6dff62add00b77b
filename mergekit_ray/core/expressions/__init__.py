"""The tree that computes one output tensor.

A plan holds one expression per output tensor. Nodes are plain frozen data: they name methods and files, they never hold
weights. Every node knows the spec of its result and what must be read for any run of it.

    Load(model, spec, location)          bytes as they are
    Gather(parts, spec, runs)            rows of loads in another order    Rows(parts, spec, runs)   of anything
    Cast(x, dtype)                       one rounding
    Scale(x, factor, ...)                x * factor
    Merge(method, spec, inputs, ...)     a merge method over several tensors
    LowRank(x, a, b, scale, ...)         x + scale * (b @ a): a LoRA
    ExpertLowRank(x, a, b, scale, ...)   the same for each expert of a layer
    LowRankFactors(x, rank, ...)         the best b and a for a matrix    SingularValues(x)
    Noise(x, distribution, scale, key)   x plus random numbers that are a function of key and index
    Constant(spec, value)   Literal(spec, values)   Concat(parts, spec)
    Approximated(method, spec, ...)      rows of tokens that a model does not have
    BlockScaled(codes, scales, block)    8-bit floats times the scale of their block
    Mxfp4(blocks, scales, name)          4-bit floats in groups that share an exponent

A new kind is one module here (imported below, so that plans can be read back) and one of the same name in
`evaluation.nodes`.
"""

from mergekit_ray.core.expressions.approximated import Approximated
from mergekit_ray.core.expressions.arithmetic import Cast, Merge, Scale
from mergekit_ray.core.expressions.base import (
    Expression,
    Load,
    Scalar,
    Stored,
    from_json,
    is_copy,
    loads,
    needed,
    read_bytes,
    spec_from_json,
    spec_to_json,
    stored,
    substituted,
    to_json,
)
from mergekit_ray.core.expressions.expert_low_rank import ExpertLowRank
from mergekit_ray.core.expressions.factors import NUM_NORMS, LowRankFactors, SingularValues
from mergekit_ray.core.expressions.gather import Gather, gathered
from mergekit_ray.core.expressions.generated import Concat, Constant, Literal, Noise, without_values
from mergekit_ray.core.expressions.low_rank import LowRank
from mergekit_ray.core.expressions.quantised import BlockScaled, Mxfp4
from mergekit_ray.core.expressions.rows import Rows
from mergekit_ray.core.expressions.runs import ZEROS, Runs
from mergekit_ray.core.expressions.selection import rows

__all__ = [
    "NUM_NORMS",
    "ZEROS",
    "Approximated",
    "BlockScaled",
    "Cast",
    "Concat",
    "Constant",
    "ExpertLowRank",
    "Expression",
    "Gather",
    "Literal",
    "Load",
    "LowRank",
    "LowRankFactors",
    "Merge",
    "Mxfp4",
    "Noise",
    "Rows",
    "Runs",
    "Scalar",
    "Scale",
    "SingularValues",
    "Stored",
    "from_json",
    "gathered",
    "is_copy",
    "loads",
    "needed",
    "read_bytes",
    "rows",
    "spec_from_json",
    "spec_to_json",
    "stored",
    "substituted",
    "to_json",
    "without_values",
]
