"""Tensors that only some of the models have: copied from one of them, left out, or an error.

What ``config.json`` does not count as the model's layers (modules for multi-token prediction, towers of other
modalities, poolers, classifier heads) is an extra: unless the recipe says otherwise, the output has what the model has
whose config it gets. A tensor of the stack proper or its embedding is none, and must be in all models; so must a head,
but for models whose class has another one, or none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergekit_ray.architectures.anatomy import place_of
from mergekit_ray.architectures.heads import lacks_head
from mergekit_ray.config.recipe import Missing
from mergekit_ray.planning.lowering import Lowering, Model, Operand
from mergekit_ray.planning.matching.mismatches import Groups, Mismatches

PREDICTION = re.compile(r"(^|\.)(mtp|nextn)[^.]*(\.|$)")
"""Names of modules for multi-token prediction that stand outside the layers."""

_OTHER_MODALITY = re.compile(r"vision|visual|image|video|audio|speech|mm_|multi_?modal|projector", re.IGNORECASE)
_PROPER = re.compile(
    r"\w*embed\w*|\w*norm\w*|ln_\w+|wte|wpe|shared|project_(in|out)|rotary\w*|position\w*|lm_head|embed_out|output",
    re.IGNORECASE,
)
"""Names of what every model needs outside its layers."""


class PartialTensors:
    """Decides on tensors that only some models have.

    Args:
        missing: what the recipe says; None for the default: extras come from the donor, all else is an error.
        donor: whose config the output gets.
        result: gets the tensors that are dropped.
        mismatches: gets what is an error.
    """

    def __init__(self, missing: Missing | None, donor: Model, result: Lowering, mismatches: Mismatches) -> None:
        self._missing = missing
        self._donor = donor
        self._result = result
        self._mismatches = mismatches
        self._settled = Groups()

    def source_of(self, name: str, everyone: Sequence[Operand], base: Operand | None) -> Operand | None:
        """Where a tensor is copied from, or None where it is left out or an error; what happens is noted.

        Args:
            name: of the output tensor.
            everyone: what it would be made of; some of it is not there.
            base: the base's.
        """
        having = [operand for operand in everyone if operand.exists]
        lacking = [operand for operand in everyone if not operand.exists]
        prefix = _absent_part(name, lacking)
        where = f"in {_listed(having)}, not in {_listed(lacking)}"
        if self._missing == "error" or (self._missing is None and not self._is_extra(name, prefix, having, lacking)):
            self._mismatches.add(name, where, prefix)
            return None
        default = base or self._of_donor(name, everyone)
        takes_first = self._missing == "first" or (self._missing == "merge" and not default.exists)
        source = having[0] if takes_first else None if self._missing == "drop" else default
        if source is None or not source.exists:
            reason = "left out" if self._missing == "drop" else f"left out, as {_listed([default])} has none"
            self.leave_out(name, having, prefix, where, reason)
            return None
        self._settled.add(name, f"{where}: copied from {source.model.reference}", prefix)
        for operand in having:
            if operand.model is not source.model:
                self._result.dropped[operand.label] = (
                    f"not all models have it: that of {source.model.reference} is copied"
                )
        return source

    def refuse(self, name: str, having: Sequence[Operand], lacking: Sequence[Operand], why: str) -> None:
        """Note that a tensor cannot be merged from those that have it."""
        where = f"in {_listed(having)}, not in {_listed(lacking)}" if having else f"not in {_listed(lacking)}"
        self._mismatches.add(name, f"{where}: {why}", _absent_part(name, lacking))

    def note_merged(self, name: str, having: Sequence[Operand], lacking: Sequence[Operand]) -> None:
        """Note that a tensor is merged from those that have it."""
        where = f"in {_listed(having)}, not in {_listed(lacking)}"
        self._settled.add(name, f"{where}: merged from the former", _absent_part(name, lacking))

    def leave_out_base(self, name: str, base: Operand, sources: Sequence[Operand]) -> None:
        """Note that the output does without a tensor that the base alone has."""
        reason = "left out, as no model that is merged has it"
        self.leave_out(name, [base], _absent_part(name, sources), f"in {base.model.reference} alone", reason)

    def leave_out(self, name: str, having: Sequence[Operand], prefix: str, where: str, reason: str) -> None:
        """Note a tensor that the output does without.

        Args:
            name: what it would be called.
            having: what it would be made of.
            prefix: the leading part of the name that the warning is about.
            where: which models have it.
            reason: why it is left out.
        """
        self._settled.add(name, f"{where}: {reason}", prefix)
        for operand in having:
            self._result.dropped[operand.label] = reason
            if operand.model is self._donor and is_beyond(operand.model, operand.name):
                self._result.keeps_beyond = False

    def warnings(self) -> list[str]:
        """One for each group of tensors that was copied or left out."""
        return [f"{names} {'is' if number == 1 else 'are'} {what}" for names, what, number in self._settled.told()]

    def _of_donor(self, name: str, everyone: Sequence[Operand]) -> Operand:
        """The donor's tensor. A donor that is not merged has it by the output's name."""
        return next((operand for operand in everyone if operand.model is self._donor), Operand(self._donor, name))

    def _is_extra(self, name: str, prefix: str, having: Sequence[Operand], lacking: Sequence[Operand]) -> bool:
        main = self._donor.anatomy.main
        if main is None:
            return False
        place = place_of(f"{prefix}.")
        if place is not None:
            # A layer of a stack that the model has: an extra only beyond the layers that the config counts.
            is_layer = place.stack == main and not place.rest
            return is_layer and all(place.layer >= operand.model.anatomy.num_layers for operand in having)
        if f"{main}.".startswith(f"{prefix}."):
            return False
        if all(lacks_head(o.model.checkpoint.config) for o in lacking) and all(_is_of_head(name, o) for o in having):
            return True
        vocabulary = {n for o in having for n in (*o.model.anatomy.vocabulary, *o.model.anatomy.redundant)}
        if any(operand.name in vocabulary or operand.name == operand.model.anatomy.embedding for operand in having):
            return False
        parts, stack = name.split("."), main.split(".")
        common = next((i for i, part in enumerate(stack) if parts[i : i + 1] != [part]), len(stack))
        own = parts[common]
        if prefix == name and common < len(parts) - 1:
            return False  # a bias more in a module that all have
        if PREDICTION.search(own) or _OTHER_MODALITY.search(own):
            return True
        is_beside = common == len(stack) - 1 > 0  # a sibling of the layers: what comes right before or after them
        return not (_PROPER.fullmatch(own) or is_beside)


def is_beyond(model: Model, name: str) -> bool:
    """Whether a tensor is of a layer beyond those that the config counts, or of a module that predicts more tokens."""
    place = place_of(name)
    if place is not None and place.stack == model.anatomy.main:
        return place.layer >= model.anatomy.num_layers
    return PREDICTION.search(name) is not None


def _is_of_head(name: str, operand: Operand) -> bool:
    """Whether a tensor is of a head: it comes after the layers, outside of what they stand in, or is tied to be one."""
    anatomy = operand.model.anatomy
    if operand.name == anatomy.embedding:
        return name != operand.name
    inner = (anatomy.main or "").rpartition(".")[0]
    return operand.name in anatomy.after and inner != "" and not operand.name.startswith(f"{inner}.")


def beyond_part(name: str) -> str:
    """The leading part of such a name that all of one layer or module share."""
    found = PREDICTION.search(name)
    if found is not None:
        return name[: found.end()].removesuffix(".")
    place = place_of(name)
    return name if place is None else f"{place.stack}.{place.layer}"


def _absent_part(name: str, lacking: Sequence[Operand]) -> str:
    """The shortest leading part of a name below which none of the models has anything."""
    given = name.split(".")
    parts = [(operand.model.prefixes, operand.name.split(".")) for operand in lacking]
    for length in range(1, len(given)):
        if all(".".join(own[:length]) not in prefixes for prefixes, own in parts):
            return ".".join(given[:length])
    return name


def _listed(operands: Sequence[Operand]) -> str:
    return ", ".join(dict.fromkeys(str(operand.model.reference) for operand in operands))
