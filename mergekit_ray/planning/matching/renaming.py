"""A text model and the language model inside a multimodal one: a model seen under the names that another gives.

Names match below what wraps them (`mergekit_ray.planning.matching.names`). The donor decides what the output's
tensors are called; what has no counterpart in it keeps its name, and is an extra
(`mergekit_ray.planning.matching.partial`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from mergekit_ray.architectures.anatomy import Anatomy, anatomy, is_buffer, place_of
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Expression
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Model, Rules
from mergekit_ray.planning.matching.mismatches import classes_told, pattern_of
from mergekit_ray.planning.matching.names import bare
from mergekit_ray.planning.weights import Weights

_MAX_LISTED = 3
_ONE_FORM = "merge models of one architecture, or bring one into the other's form with transformers"
_ONE_CLASS = "merge models of one class: some store experts packed, others singly, and transformers keeps their forms"


class RenamedWeights:
    """Tensors under other names. See `mergekit_ray.planning.weights.Weights`.

    Args:
        weights: the tensors.
        stored: what each is called there, by its new name.
    """

    def __init__(self, weights: Weights, stored: Mapping[str, str]) -> None:
        self._weights = weights
        self._stored = stored
        self.inputs: Mapping[str, Checkpoint] = weights.inputs
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(weights.specs[theirs], name=name) for name, theirs in stored.items()
        }

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`."""
        return self._weights.expression(self._stored[name], shape)


def renamed(model: Model, donor: Model, rules: Rules) -> Model:
    """A model with the donor's names; itself if it has them.

    Args:
        model: any.
        donor: whose names the output has.
        rules: what the recipe says of tensors that are not merged.

    Raises:
        ModelError: the layers have no counterpart in the donor, or more than one, or are not like those there.
    """
    if model.weights.specs.keys() <= donor.weights.specs.keys():
        return model
    names = _DonorsNames(model, donor)
    stored: dict[str, str] = {}
    for name in model.weights.specs:
        new = names.name_of(name)
        if new in stored:
            raise _fault(model, donor, f"{stored[new]!r} and {name!r} of {model.reference} would both be {new!r}")
        stored[new] = name
    changed = {new: name for new, name in stored.items() if new != name}
    main = donor.anatomy.main
    if main is not None and model.anatomy.main is not None and main not in names.stacks.values():
        raise _fault(model, donor, "whose names do not match")
    if not changed:
        return model
    weights = RenamedWeights(model.weights, stored)
    parts = anatomy(weights.specs, model.checkpoint.config, f"model {model.reference}")
    if model.anatomy.main != main:
        _check_layers(model, parts, donor, rules)
    return replace(model, weights=weights, anatomy=parts, stored_names=changed)


def notes(model: Model, seen: Model) -> list[str]:
    """The message about a model whose tensors are seen under other names."""
    ours, theirs = model.anatomy.main, seen.anatomy.main
    return [] if ours == theirs else [f"the layers of {model.reference}, {ours}.*, are merged as {theirs}.*"]


class _DonorsNames:
    """What a donor calls the tensors of another model.

    Attributes:
        stacks: by the model's name of a stack.
    """

    def __init__(self, model: Model, donor: Model) -> None:
        self._model, self._donor = model, donor
        # Only what the model does not have by the same name can be the counterpart of another name.
        stacks = donor.anatomy.stacks.keys() - model.anatomy.stacks.keys()
        outside = donor.weights.specs.keys() - model.weights.specs.keys()
        self._stacks = _by_bare_name(sorted(stacks), "{}.0.")
        self._outside = _by_bare_name(sorted(name for name in outside if place_of(name) is None), "{}")
        self.stacks = {
            stack: stack if stack in donor.anatomy.stacks else self._only(stack, bare(f"{stack}.0."), self._stacks)
            for stack in model.anatomy.stacks
        }

    def name_of(self, name: str) -> str:
        """The donor's name of a tensor; the same, if it has nothing like it."""
        place = place_of(name)
        if name in self._donor.weights.specs:
            return name
        if place is not None:
            return f"{self.stacks[place.stack]}.{place.layer}.{place.rest}"
        if name == self._model.anatomy.head and self._donor.anatomy.head is None:
            return self._head(name)
        return self._only(name, bare(name), self._outside)

    def _only(self, name: str, wanted: str, counterparts: Mapping[str, list[str]]) -> str:
        found = counterparts.get(wanted, [name])
        if len(found) > 1:
            raise _fault(self._model, self._donor, f"and {name!r} may be any of {', '.join(map(repr, found))}")
        return found[0]

    def _head(self, name: str) -> str:
        """The head of a donor that has none of its own (it is tied): at the same place beside the layers."""
        ours, theirs = ((m.anatomy.main or "").split(".")[:-1] for m in (self._model, self._donor))
        if ours == theirs:
            return name
        if theirs[len(theirs) - len(ours) :] == ours:
            return ".".join([*theirs[: len(theirs) - len(ours)], name])
        return bare(name)


def _by_bare_name(names: Iterable[str], form: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[bare(form.format(name))].append(name)
    return found


def _check_layers(model: Model, parts: Anatomy, donor: Model, rules: Rules) -> None:
    """All of the smaller model's layers have their counterparts, unless the recipe says what becomes of the rest."""
    main = donor.anatomy.main
    assert main is not None
    ours, theirs = (
        {pattern_of(f"{main}.0.{rest}") for layer in a.layers.get(main, ()) for rest in layer}
        for a in (parts, donor.anatomy)
    )
    odd = sorted(name for name in ours ^ theirs if rules.merges(name) and not is_buffer(name))
    if odd and rules.missing is None:
        shown = ", ".join(odd[:_MAX_LISTED]) + (", ..." if len(odd) > _MAX_LISTED else "")
        is_packed = any(".experts." in name for name in odd)
        raise _fault(model, donor, f"and only one of them has {shown}", _ONE_CLASS if is_packed else _ONE_FORM)


def _fault(model: Model, donor: Model, what: str, remedy: str = _ONE_FORM) -> ModelError:
    return ModelError(
        f"the models do not fit together{classes_told([donor, model])}: {model.reference} keeps its language model "
        f"under {model.anatomy.main}, {donor.reference} under {donor.anatomy.main}, {what}",
        remedy=remedy,
    )
