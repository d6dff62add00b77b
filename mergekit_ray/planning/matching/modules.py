"""Names of modules in recipes: which tensors ``modules: {NAME: ...}`` means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergekit_ray.architectures.anatomy import place_of
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.lowering import Model

_MAX_LISTED = 12
_TEXT = ("text_decoder", "text_model", "language_model", "decoder", "llm")
_PROJECTOR = re.compile(r"projector|connector|merger|aligner|^embed_(vision|audio)$", re.IGNORECASE)
_PARTS = {
    re.compile(r"vision|visual|image", re.IGNORECASE): (
        "vision",
        "vision_encoder",
        "vision_tower",
        "vision_model",
        "visual",
    ),
    re.compile(r"audio|speech", re.IGNORECASE): (
        "audio",
        "audio_encoder",
        "audio_tower",
        "audio_model",
        "speech_encoder",
    ),
    _PROJECTOR: ("projector", "multi_modal_projector", "mm_projector", "connector", "merger"),
}
"""What the parts of multimodal models are called in recipes, by what they are called in files."""


def below(name: str, prefix: str) -> bool:
    """Whether a name is ``prefix``, or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def module_prefix(name: str, donor: Model) -> str | None:
    """The tensors that a module name means: all (None), or those whose names have the result as leading components.

    Args:
        name: as the recipe has it: a leading part of tensors' names, its last component, or what a part of multimodal
            models is commonly called (``text_decoder``, ``vision_encoder``), if the donor has one such part.
        donor: the model whose names the output has.

    Raises:
        PlanError: it names nothing, or several parts.
    """
    if name == "default":
        return None
    if name in _TEXT and len(donor.anatomy.stacks) == 1:
        return None
    prefixes = sorted({".".join(n.split(".")[:i]) for n in donor.weights.specs for i in (1, 2)})
    for prefix in prefixes:
        if prefix == name or prefix.split(".")[-1] == name:
            return prefix
    modules = sorted(set(_modules(donor.weights.specs)))
    towers = [prefix for pattern in _PARTS for prefix in _outermost(modules, pattern)]
    if name in _TEXT:
        if not towers:
            return None
        found = _text_part(donor, towers)
    else:
        found = [p for pattern, names in _PARTS.items() if name in names for p in _outermost(modules, pattern)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or prefixes[:_MAX_LISTED])
    raise PlanError(
        f"module {name!r} may be any of several parts" if found else f"no tensors belong to a module {name!r}",
        where=f"model {donor.reference}",
        remedy=f"use 'default' for the whole model, or one of: {listed}",
    )


def main_stack(donor: Model, prefix: str | None) -> str | None:
    """The stack that layer ranges of a module count: the model's main one, or else the module's with the most tensors.

    Args:
        donor: the model whose names the output has.
        prefix: the module's, as `module_prefix` finds it.

    Returns:
        None if the module has no layers.
    """
    anatomy = donor.anatomy
    if prefix is None or (anatomy.main is not None and below(anatomy.main, prefix)):
        return anatomy.main
    own = [stack for stack in anatomy.stacks if below(stack, prefix)]
    return max(own, key=lambda s: (sum(map(len, anatomy.layers[s])), -anatomy.stacks[s]), default=None)


def _modules(names: Iterable[str]) -> Iterable[str]:
    """Every module above the tensors, down to the first numbered one."""
    for name in names:
        place = place_of(name)
        parts = name.split(".")[:-1] if place is None else place.stack.split(".")
        yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _outermost(modules: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """Modules of a kind by their own names, but for those inside of others of any kind."""
    found = []
    for module in modules:
        outer, _, own = module.rpartition(".")
        is_inside = any(kind.search(part) for part in outer.split(".") for kind in _PARTS)
        is_other = pattern is not _PROJECTOR and _PROJECTOR.search(own) is not None
        if pattern.search(own) and not is_inside and not is_other:
            found.append(module)
    return found


def _text_part(donor: Model, towers: list[str]) -> list[str]:
    """What is around the main stack and around no tower."""
    parts = (donor.anatomy.main or "").split(".")[:-1]
    outer = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return [prefix for prefix in outer if not any(below(tower, prefix) for tower in towers)][:1]
