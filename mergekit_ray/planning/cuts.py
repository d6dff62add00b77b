"""A recipe's slices with their models looked up: which layers of which model each takes."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ray.config.normal import NormalSlice
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Resolver
from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.planning.lowering import Cut, Model


def cut_of(
    recipe: NormalSlice,
    models: Mapping[ModelReference, Model],
    method: type[MethodDeclaration],
    donor: Model,
    stack: str | None,
    *,
    is_only: bool,
) -> Cut:
    """Look up what a slice takes.

    Args:
        recipe: the slice.
        models: every model it names.
        method: the recipe's merge method.
        donor: whose config the output gets.
        stack: whose layers it takes; None if its module has none.
        is_only: whether its module has no other slice.

    Raises:
        ModelError: models of different depths, and the recipe does not say which layers go together.
        PlanError: a layer range goes beyond its model, or the base's is not given.
    """
    sources = tuple(models[source.model] for source in recipe.inputs)
    base = None if recipe.base is None else models[recipe.base]
    is_all = all(source.layer_range is None for source in recipe.inputs)
    counts = {}
    if not recipe.inputs and recipe.base_layer_range is not None:  # nothing is added to the base
        is_all, (first, last) = False, recipe.base_layer_range
        counts[str(recipe.base)] = last - first
    for source, model in zip(recipe.inputs, sources, strict=True):
        first, last = source.layer_range or (0, model.anatomy.stacks.get(stack or "", 0))
        _check_range(model, (first, last), donor, stack)
        counts[str(model.reference)] = last - first
    if base is not None and recipe.base_layer_range is not None:
        _check_range(base, recipe.base_layer_range, donor, stack)
    if is_all and base is not None:
        counts.setdefault(str(base.reference), base.anatomy.stacks.get(stack or "", 0))
    if is_all and is_only:  # no slices: the config that the output gets describes as many layers
        counts.setdefault(str(donor.reference), donor.anatomy.stacks.get(stack or "", 0))
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ModelError(
            f"the models have different numbers of layers ({listed})",
            remedy="merge models of one depth, or say with slices which layers go together",
        )
    return Cut(
        parameters=Resolver(method.global_parameters, recipe.levels, f"method {method.name}"),
        source_parameters=tuple(
            Resolver(method.model_parameters, source.levels, f"model {source.model}") for source in recipe.inputs
        ),
        sources=sources,
        first_layers=tuple((source.layer_range or (0, 0))[0] for source in recipe.inputs),
        base=base,
        base_first_layer=_base_first_layer(recipe, base),
        num_layers=next(iter(counts.values())),
        is_all=is_all,
    )


def _check_range(model: Model, layer_range: tuple[int, int], donor: Model, stack: str | None) -> None:
    first, last = layer_range
    count = model.anatomy.stacks.get(stack or "", 0)
    if last > count:
        layers = counted(count, "layer")
        is_main = stack is not None and stack == donor.anatomy.main
        whose = f"the model's {layers}" if is_main else f"the {layers} of {stack or 'its module'}"
        raise PlanError(
            f"layer_range [{first}, {last}] goes beyond {whose}",
            where=f"model {model.reference}",
            remedy=f"layer ranges are end exclusive: at most [0, {count}]"
            if count
            else "a module without layers takes `models` in place of `slices`",
        )


def _base_first_layer(recipe: NormalSlice, base: Model | None) -> int:
    if base is None:
        return 0
    if recipe.base_layer_range is not None:
        return recipe.base_layer_range[0]
    if any(source.layer_range is not None for source in recipe.inputs):
        firsts = ", ".join(str(source.layer_range) for source in recipe.inputs)
        raise PlanError(
            f"the sources of a slice take different layers ({firsts}), and the base model's are not given",
            where=f"base_model {base.reference}",
            remedy="add the base model to the slice's sources with the layer_range to use",
        )
    return 0
