"""Names of modules in recipes: which tensors ``modules: {NAME: ...}`` means."""

from __future__ import annotations

from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.lowering import Model

_MAX_LISTED = 12


def below(name: str, prefix: str) -> bool:
    """Whether a name is ``prefix``, or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def module_prefix(name: str, donor: Model) -> str | None:
    """The tensors that a module name means: all (None), or those whose names have the result as leading components.

    Args:
        name: as the recipe has it.
        donor: the model whose names the output has.

    Raises:
        PlanError: it names nothing.
    """
    if name == "default":
        return None
    anatomy = donor.anatomy
    if name in ("text_decoder", "decoder", "language_model") and len(anatomy.stacks) == 1:
        return None
    prefixes = sorted({".".join(n.split(".")[:i]) for n in donor.weights.specs for i in (1, 2)})
    for prefix in prefixes:
        if prefix == name or prefix.split(".")[-1] == name:
            return prefix
    raise PlanError(
        f"no tensors belong to a module {name!r}",
        where=f"model {donor.reference}",
        remedy=f"use 'default' for the whole model, or one of: {', '.join(prefixes[:_MAX_LISTED])}",
    )
