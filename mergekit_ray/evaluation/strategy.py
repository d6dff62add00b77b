"""How a tensor is computed: one decision for each, made before anything of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mergekit_ray.core.expressions import Approximated, Expression, Merge, is_copy
from mergekit_ray.core.registry import METHODS
from mergekit_ray.evaluation.compiled import Compiled, compiled, objection
from mergekit_ray.evaluation.device.names import CPU
from mergekit_ray.methods.shared.protocol import is_portable


class Strategy(StrEnum):
    """The ways there are."""

    COPY = "copied"
    COMPILED = "compiled"
    TORCH = "torch"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Choice:
    """A way, and why it was taken.

    Attributes:
        strategy: the way.
        why: in words, for `plan --explain` and the debug log.
        compiled: what computes the tensor where the way is `Strategy.COMPILED`. What is not finite, and runs whose
            bytes are not aligned, are left to torch even then.
    """

    strategy: Strategy
    why: str
    compiled: Compiled | None = None


def choose(expression: Expression, device: str, *, allow_non_finite: bool = False) -> Choice:
    """How an expression is computed.

    Args:
        expression: of one output tensor.
        device: ``cpu``, or another that there is (see `evaluation.device.names.resolve`).
        allow_non_finite: NaN and infinities are allowed.
    """
    if is_copy(expression):
        return Choice(Strategy.COPY, "the input's bytes are the result")
    fixed = _fixed_to_cpu(expression)
    if device != CPU and fixed is None:
        return Choice(Strategy.DEVICE, f"computed on {device}")
    prefix = (
        ""
        if device == CPU
        else f"{fixed} selects elements by functions that CPU and GPU round differently; so, on the CPU:  "
    )
    if allow_non_finite:
        return Choice(Strategy.TORCH, f"{prefix}NaN and infinities that are let pass have the bits torch gives them")
    found = compiled(expression)
    if found is not None:
        return Choice(Strategy.COMPILED, f"{prefix}loops from the bytes read to the bytes written", found)
    return Choice(Strategy.TORCH, f"{prefix}{objection(expression)}")


def _fixed_to_cpu(expression: Expression) -> str | None:
    """The name of a method in the tree that works on the CPU only, see `ElementwiseMethod.portable`."""
    if isinstance(expression, Approximated):
        return expression.method
    if isinstance(expression, Merge) and not is_portable(METHODS.get(expression.method)):
        return expression.method
    return next((found for child in expression.children() if (found := _fixed_to_cpu(child))), None)
