"""What is checked of a recipe before anything is computed: `merge` and ``validate`` refuse the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ray.config.load import Recipe
from mergekit_ray.config.stages import StagedRecipe
from mergekit_ray.core.errors import PlanError
from mergekit_ray.operations.prepare import Prepared, prepare
from mergekit_ray.output.destination import check_inputs_apart
from mergekit_ray.output.places import below, check_apart
from mergekit_ray.planning.make import check_plannable
from mergekit_ray.storage.opening import open_sink


@dataclass(frozen=True, slots=True)
class Part:
    """A model that a recipe writes.

    Attributes:
        recipe: that makes it: all of the recipe, or as far as a stage with an output.
        place: folder or URI where it goes; None if nobody has said.
    """

    recipe: Recipe
    place: str | None


def parts_of(recipe: Recipe, output: str | None) -> list[Part]:
    """What a recipe writes, in order, once everything that can be said without looking at a model has been checked.

    Args:
        recipe: validated.
        output: folder or URI of the last one, in place of the recipe's own.

    Raises:
        PlanError: the recipe cannot be planned, or two models go to one place.
        ConfigError: nothing can be written at such a place.
    """
    check_plannable(recipe)
    parts = []
    if isinstance(recipe, StagedRecipe):
        parts = [Part(recipe.upto(stage), stage.output.path) for stage in recipe.written]
    parts.append(Part(recipe, recipe.output.path if output is None else output))
    places = [open_sink(part.place).uri for part in parts if part.place is not None]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise PlanError("two stages have the same output", where=place, remedy="give each a place of its own")
        for earlier in places[:i]:
            if below(place, earlier) is not None or below(earlier, place) is not None:
                raise PlanError(
                    f"the output of a stage is inside that of another, {earlier}",
                    where=place,
                    remedy="give each a place beside the other",
                )
    return parts


def prepare_parts(
    parts: Sequence[Part],
    *,
    seed: int | None = None,
    allow_config_conflicts: bool = False,
    unsafe_ignore_tokenizers: bool = False,
) -> list[Prepared]:
    """Open the models of each part and plan it, from headers alone.

    Args:
        parts: of `parts_of`.
        seed: as in `prepare`, and so are the others.
        allow_config_conflicts: as in `MergeOptions`.
        unsafe_ignore_tokenizers: as in `MergeOptions`.

    Raises:
        MergekitRayError: as `prepare` does; or an output is an input or in one, or the router of a mixture whose
            earlier stages are written first cannot be made.
    """
    prepared = [
        prepare(
            part.recipe,
            seed=seed,
            allow_config_conflicts=allow_config_conflicts,
            unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
        )
        for part in parts
    ]
    for part, own in zip(parts, prepared, strict=True):
        if part.place is not None:
            uri = open_sink(part.place).uri
            check_inputs_apart(own.plan, uri)
            for other in (each for each in prepared if each is not own):
                check_apart({model.uri: model.files for model in other.plan.inputs.values()}, uri)
        if len(parts) > 1:
            own.check_routable()
    return prepared
