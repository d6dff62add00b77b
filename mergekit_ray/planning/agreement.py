"""Whether what the models' configs say fits together: one config must describe all that is merged or stacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mergekit_ray.architectures.anatomy import is_buffer, language_config
from mergekit_ray.architectures.layer_kinds import RULES
from mergekit_ray.architectures.settings import (
    MODEL_TYPE,
    NUANCES,
    OUTER,
    SIZES,
    STRUCTURE,
    UNSTATED,
    Setting,
    others,
    parts,
)
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import NormalModule, NormalSlice, normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.sizes import counted
from mergekit_ray.planning.layer_order import kinds_of
from mergekit_ray.planning.lowering import Model

_RULED: Final = frozenset(rule.key for rule in RULES)
_MAX_LISTED: Final = 12
_MAX_TENSORS: Final = 3
_MAX_VALUE: Final = 120

_LANGUAGE_MODULES: Final = ("default", "text_decoder", "decoder", "language_model")
"""Names of modules that mean the language model whatever its tensors are called."""

_ALLOW: Final = "`options=MergeOptions(allow_config_conflicts=True)`"


@dataclass
class Findings:
    """How models differ.

    Attributes:
        conflicts: one config cannot describe them all.
        remarks: one config can, and it may be meant.
        are_unlike: tensors that would be merged differ in shape, so that no option helps.
    """

    conflicts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    are_unlike: bool = False


def check_agreement(
    recipe: DenseRecipe | MoeRecipe, models: Mapping[ModelReference, Model], *, allow_conflicts: bool = False
) -> list[str]:
    """Compare the configs of a recipe's models, and the layers that slices put into one stack.

    Args:
        recipe: validated.
        models: every model it names.
        allow_conflicts: conflicts are warnings, too.

    Returns:
        Warnings.

    Raises:
        ModelError: naming the models, the keys or tensors, and both values of each conflict.
    """
    found = Findings()
    donor = models[recipe.donor]
    merged: list[list[Model]] = []  # tensor by tensor
    if isinstance(recipe, MoeRecipe):
        sources = [expert.source_model for expert in (*recipe.experts, *(recipe.shared_experts or ()))]
        # Attention is not taken from them; what is must fit (`planning.moe.checks`).
        everyone = [models[each] for each in dict.fromkeys((recipe.donor, *sources))]
        merged.append(everyone)
        found.remarks += [*differences(everyone, (*SIZES, *NUANCES)), *other_differences(everyone)]
    dense = recipe.backbone if isinstance(recipe, MoeRecipe) else recipe
    stacks = [module for module in normalise(dense) if _is_language(module, donor)] if dense is not None else []
    for module in stacks:
        _compare(module, models, donor, found)
    told = _settled(found, f"the result has the config.json of {donor.reference}", allow_conflicts=allow_conflicts)
    return told + [line for module in stacks for line in _unlike_kinds(module, models)]


def check_pair(base: Model, tuned: Model, *, allow_conflicts: bool = False) -> list[str]:
    """Compare the configs and layers of two models whose difference is to be an adapter; as `check_agreement`."""
    both = [base, tuned]
    of_type = differences(both, (MODEL_TYPE,)) or _architectures(both)
    unlike = _unlike_pair(base, tuned)
    found = Findings(
        [*(of_type if unlike else ()), *differences(both, STRUCTURE), *unlike],
        [
            *(() if unlike else of_type),
            *differences(both, NUANCES),
            *outer_differences(both),
            *other_differences(both),
        ],
    )
    return _settled(
        found, f"the adapter is loaded with the config.json of {base.reference}", allow_conflicts=allow_conflicts
    )


def _settled(found: Findings, told: str, *, allow_conflicts: bool) -> list[str]:
    if found.conflicts and not allow_conflicts:
        rest = len(found.conflicts) - _MAX_LISTED
        listed = [*found.conflicts[:_MAX_LISTED], *([f"... and {rest} more"] if rest > 0 else [])]
        raise ModelError(
            "no config.json can describe these models together:\n  " + "\n  ".join(listed),
            remedy="use models of one architecture and size"
            + ("" if found.are_unlike else f", or pass {_ALLOW} to go on anyway"),
        )
    return [f"the models' configs differ: {line}; {told}" for line in (*found.conflicts, *found.remarks)]


def differences(models: Sequence[Model], settings: Sequence[Setting], *, per_layer: bool = True) -> list[str]:
    """The settings that configs state differently: ``key: value in model, value in model``.

    Args:
        models: the donor first.
        settings: to compare.
        per_layer: also compare what is listed layer by layer.
    """
    lines = []
    of_models = [(model, parts(model.checkpoint.config)) for model in models]
    for part in of_models[0][1]:
        there = [(model, found[part]) for model, found in of_models if part in found]
        lines += [f"{part}{'.' if part else ''}{line}" for line in _differing(there, settings, per_layer=per_layer)]
    return lines


def other_differences(models: Sequence[Model]) -> list[str]:
    """As `differences`, of whatever else configs state and may matter. Rules of layers' kinds are compared by layer."""
    lines = []
    of_models = [(model, parts(model.checkpoint.config)) for model in models]
    for part in of_models[0][1]:
        stated = [(model, others(found[part])) for model, found in of_models if part in found]
        keys = dict.fromkeys(key for _, values in stated for key in values if key not in _RULED)
        settings = [Setting(key, (key,)) for key in keys]
        prefix = f"{part}." if part else ""
        lines += [prefix + line for line in _differing(stated, settings, per_layer=False)]
    return lines


def outer_differences(models: Sequence[Model]) -> list[str]:
    """As `differences`, of what configs say of the whole model beside its parts."""
    return list(_differing([(model, model.checkpoint.config) for model in models], OUTER, per_layer=True))


def _differing(
    there: Sequence[tuple[Model, Mapping[str, Any]]], settings: Sequence[Setting], *, per_layer: bool
) -> Iterator[str]:
    for setting in settings:
        values = _grouped([(model, setting.value(config)) for model, config in there], per_layer=per_layer)
        if len(values) > 1:
            key = setting.spelling([config for _, config in there])
            shown = _shown([value for value, _ in values])
            said = (f"{value} in {' and '.join(names)}" for value, (_, names) in zip(shown, values, strict=True))
            yield f"{key}: {', '.join(said)}"


def _shown(values: Sequence[Any]) -> list[str]:
    """Values for a message; of tables only what differs."""
    if all(isinstance(value, Mapping) for value in values):
        keys = [
            key
            for key in dict.fromkeys(key for value in values for key in value)
            if any(key not in value or value[key] != values[0].get(key) for value in values)
        ]
        values = [{key: value[key] for key in keys if key in value} for value in values]
    return [repr(value)[:_MAX_VALUE] for value in values]


def _grouped(values: Sequence[tuple[Model, Any]], *, per_layer: bool) -> list[tuple[Any, list[str]]]:
    """Each value with the models that state it, as the first one comes."""
    groups: list[tuple[Any, list[str]]] = []
    for model, value in values:
        if value is UNSTATED or (isinstance(value, list) and not per_layer):
            continue
        names = next((names for known, names in groups if known == value), None)
        if names is None:
            groups.append((value, names := []))
        names.append(str(model.reference))
    return groups


# -- one module of a dense recipe -------------------------------------------------------------------------------------


def _is_language(module: NormalModule, donor: Model) -> bool:
    """Whether a module holds the layers that ``num_hidden_layers`` counts, which is what the settings are about."""
    if module.name is None or module.name in _LANGUAGE_MODULES:
        return True
    return f".{module.name}." in f".{donor.anatomy.main}."


def _compare(module: NormalModule, models: Mapping[ModelReference, Model], donor: Model, found: Findings) -> None:
    named = {donor.reference: donor}
    for piece in module.slices:
        for reference in (piece.base, *(source.model for source in piece.inputs)):
            if reference is not None:
                named[reference] = models[reference]
    listed = list(named.values())
    is_cut = len(module.slices) > 1 or any(source.layer_range for source in module.slices[0].inputs)
    of_type = differences(listed, (MODEL_TYPE,)) or _architectures(listed)
    (found.conflicts if is_cut else found.remarks).extend(of_type)
    found.conflicts += differences(listed, STRUCTURE, per_layer=not is_cut)
    found.remarks += differences(listed, NUANCES, per_layer=not is_cut)
    found.remarks += [*outer_differences(listed), *other_differences(listed)]
    if is_cut:
        found.conflicts += _unlike_layers(module, models, donor)
    else:
        found.are_unlike |= any(_unlike_shapes(donor, model) for model in listed)


def _unlike_shapes(donor: Model, model: Model) -> bool:
    """Whether tensors of the first layers have one name and two shapes."""
    if donor.anatomy.main != model.anatomy.main or not (donor.anatomy.num_layers and model.anatomy.num_layers):
        return False
    ours, theirs = dict(_shapes(donor, 0)), dict(_shapes(model, 0))
    return any(ours[rest] != theirs[rest] for rest in ours.keys() & theirs.keys())


def _architectures(models: Sequence[Model]) -> list[str]:
    """How the classes differ, where a config does not state its model_type."""
    configs = [model.checkpoint.config for model in models]
    if all("model_type" in language_config(config) for config in configs):
        return []
    stated = [
        (model, names[0].partition("For")[0])
        for model, config in zip(models, configs, strict=True)
        if (names := config.get("architectures")) and isinstance(names, list) and isinstance(names[0], str)
    ]
    groups = _grouped(stated, per_layer=True)
    said = ", ".join(f"{value} in {' and '.join(names)}" for value, names in groups)
    return [f"architectures: {said}"] if len(groups) > 1 else []


def _unlike_layers(module: NormalModule, models: Mapping[ModelReference, Model], donor: Model) -> list[str]:
    """Tensors of layers that are not in any layer of the donor, or of another shape there, or that all its layers have.

    Where the donor's own layers differ, its config says how, and says it of the result's (OpenELM, hybrids).
    """
    known: dict[str, set[tuple[int, ...]]] = {}
    count: dict[str, int] = {}
    for layer in range(donor.anatomy.num_layers):
        for rest, shape in _shapes(donor, layer):
            known.setdefault(rest, set()).add(shape)
            count[rest] = count.get(rest, 0) + 1
    everywhere = [rest for rest, number in count.items() if number == donor.anatomy.num_layers]
    problems: dict[ModelReference, dict[str, list[str]]] = {}
    seen: set[tuple[ModelReference, int]] = {(donor.reference, n) for n in range(donor.anatomy.num_layers)}
    for model, layer in _stacked(module, models):
        if (model.reference, layer) in seen:
            continue
        seen.add((model.reference, layer))
        theirs = dict(_shapes(model, layer))
        at = f"{model.anatomy.main}.{layer}"
        for rest, shape in theirs.items():
            shapes = known.get(rest, set())
            if not shapes:
                line = f"{at}.{rest} of {model.reference}: no layer of {donor.reference} has such a tensor"
            elif len(shapes) == 1 and shape not in shapes:
                line = f"{at}.{rest}: {list(shape)} in {model.reference}, {list(*shapes)} in {donor.reference}"
            else:
                continue
            problems.setdefault(model.reference, {}).setdefault(rest, []).append(line)
        for rest in everywhere:
            if rest not in theirs:
                line = f"{at}.{rest}: absent in {model.reference}, there in each layer of {donor.reference}"
                problems.setdefault(model.reference, {}).setdefault(rest, []).append(line)
    return [line for reference, of_model in problems.items() for line in _shortened(reference, of_model)]


def _unlike_pair(base: Model, tuned: Model) -> list[str]:
    """Tensors of the layers with the same number that only one of two models has, or that have another shape there."""
    if base.anatomy.main != tuned.anatomy.main:  # other names: what has no counterpart is reported
        return []
    problems: dict[str, list[str]] = {}
    for layer in range(min(base.anatomy.num_layers, tuned.anatomy.num_layers)):
        ours, theirs = dict(_shapes(base, layer)), dict(_shapes(tuned, layer))
        for rest in {**ours, **theirs}:
            if ours.get(rest) == theirs.get(rest):
                continue
            said = ", ".join(
                f"{list(found[rest])} in {model.reference}" if rest in found else f"absent in {model.reference}"
                for model, found in ((base, ours), (tuned, theirs))
            )
            problems.setdefault(rest, []).append(f"{base.anatomy.main}.{layer}.{rest}: {said}")
    return _shortened(tuned.reference, problems) if problems else []


def _unlike_kinds(module: NormalModule, models: Mapping[ModelReference, Model]) -> list[str]:
    """A warning of the first layers of different kinds (full attention, a window) that slices make one layer of."""
    found: list[str] = []
    kinds: dict[ModelReference, list[dict[str, Any]]] = {}
    place = 0
    for piece in module.slices:
        lead, (start, end) = _lead(piece, models)
        sources = [(source.model, source.layer_range[0]) for source in piece.inputs if source.layer_range is not None]
        for reference in (lead.reference, *(reference for reference, _ in sources)):
            kinds.setdefault(reference, kinds_of(models[reference]))
        for offset in range(min(end, lead.anatomy.num_layers) - start):  # ranges beyond it are refused later
            own, differ = _at(kinds[lead.reference], start + offset), []
            for reference, first in sources:
                theirs = _at(kinds[reference], first + offset)
                differ += [
                    f"{key} is {own[key]!r} in layer {start + offset} of {lead.reference}, {theirs[key]!r} in layer "
                    f"{first + offset} of {reference}"
                    for key in own
                    if key in theirs and theirs[key] != own[key]
                ]
            if differ:
                found.append(f"output layer {place} merges layers of different kinds: {differ[0]}")
            place += 1
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return [found[0] + more + "; it stays of the former kind"] if found else []


def _at(kinds: Sequence[Mapping[str, Any]], layer: int) -> Mapping[str, Any]:
    return kinds[layer] if layer < len(kinds) else {}


def _shortened(reference: ModelReference, problems: Mapping[str, Sequence[str]]) -> list[str]:
    """The first layer of the first few tensors, and how many there are."""
    shown = [
        lines[0] + (f" (and so in {counted(len(lines) - 1, 'more layer')})" if len(lines) > 1 else "")
        for lines in list(problems.values())[:_MAX_TENSORS]
    ]
    rest = len(problems) - len(shown)
    more = f"{counted(rest, 'more tensor')} of the layers of {reference} {'differs' if rest == 1 else 'differ'}"
    return [*shown, more] if rest else shown


def _shapes(model: Model, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name below the layer and shape of its weights."""
    stack = str(model.anatomy.main)
    for rest in model.anatomy.layers[stack][layer]:
        if not is_buffer(name := f"{stack}.{layer}.{rest}"):
            yield rest, model.weights.specs[name].shape


def _stacked(module: NormalModule, models: Mapping[ModelReference, Model]) -> Iterator[tuple[Model, int]]:
    """The layers that the output's stack is made of: model and number; of those merged into one, the first model's."""
    for piece in module.slices:
        model, bounds = _lead(piece, models)
        for layer in range(bounds[0], min(bounds[1], model.anatomy.num_layers)):  # ranges beyond it are refused later
            yield model, layer


def _lead(piece: NormalSlice, models: Mapping[ModelReference, Model]) -> tuple[Model, tuple[int, int]]:
    if piece.base is not None:
        reference, bounds = piece.base, piece.base_layer_range
    else:
        reference, bounds = piece.inputs[0].model, piece.inputs[0].layer_range
    model = models[reference]
    return model, bounds or (0, model.anatomy.num_layers)
