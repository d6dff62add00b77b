"""What all operations on a recipe begin with: its models are opened, and a plan is made from their headers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.fields import parse_seed
from mergekit_ray.config.load import Recipe, check_recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.stages import StagedRecipe
from mergekit_ray.core.plan import Plan
from mergekit_ray.evaluation.device.names import resolve
from mergekit_ray.executors.cluster import wants_ray
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.recipes import check_stage_names, load_recipe
from mergekit_ray.planning.make import check_plannable, make_plan, referenced_models, stage_names, stages_of
from mergekit_ray.planning.moe.experts import RouterVectors
from mergekit_ray.reporting.reporters import Reporter

RecipeLike: TypeAlias = Recipe | Path | str | Mapping[str, Any]
"""A recipe, or whatever `mergekit_ray.load_recipe` takes."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge whose models are open.

    Attributes:
        recipe: with the seed that holds.
        checkpoints: the opened headers of its models.
        plan: everything that would be written, from headers alone. Routers that are made from prompts are zero in it.
        allow_config_conflicts, unsafe_ignore_tokenizers: as in `MergeOptions`.
    """

    recipe: Recipe
    checkpoints: Mapping[ModelReference, Checkpoint]
    plan: Plan
    allow_config_conflicts: bool = False
    unsafe_ignore_tokenizers: bool = False

    @property
    def needs_routing(self) -> bool:
        """Whether routers are still to be made, which reads the base model."""
        last = stages_of(self.recipe)[-1]
        return isinstance(last, MoeRecipe) and (last.add_to_base or last.gate_mode.needs_prompts)

    def check_routable(self) -> None:
        """Check that the routers can be made, as far as possible without the base model's weights.

        Raises:
            MergekitRayError: see `routing.routers.check_routable`.
        """
        last = stages_of(self.recipe)[-1]
        if isinstance(last, MoeRecipe) and last.gate_mode.needs_prompts:
            from mergekit_ray.routing.routers import check_routable  # noqa: PLC0415 - imports numpy

            check_routable(last, self.checkpoints)

    def routed(self, options: MergeOptions, kept: KeptRouters | None = None, tell: Reporter | None = None) -> Plan:
        """The plan with its routers: those that are kept, or new ones made where the options say.

        Its digest is that of `plan`, where they are made from prompts. ``tell`` is called when routers are made.

        Raises:
            MergekitRayError: see `routing.routers.routers`.
        """
        recipe = stages_of(self.recipe)[-1]
        if not isinstance(recipe, MoeRecipe) or not self.needs_routing:
            return self.plan

        def make() -> RouterVectors:
            if tell is not None:
                tell.event("routing", f"computing the routers with the layers of {recipe.donor}")
            return make_routers(recipe, self.checkpoints, options)

        plan = partial(
            make_plan,
            self.recipe,
            self.checkpoints,
            allow_config_conflicts=self.allow_config_conflicts,
            unsafe_ignore_tokenizers=self.unsafe_ignore_tokenizers,
        )
        return plan(make) if kept is None else kept.plan_with(plan, make)


def checked_recipe(recipe: RecipeLike) -> Recipe:
    """The recipe, loaded if it is not yet; one built in Python is now checked against its merge method.

    Raises:
        ConfigError: with all that is wrong.
    """
    if not isinstance(recipe, DenseRecipe | MoeRecipe | StagedRecipe):
        return load_recipe(recipe)
    check_recipe(recipe)
    return recipe


def prepare(
    recipe: RecipeLike,
    *,
    seed: int | None = None,
    allow_config_conflicts: bool = False,
    unsafe_ignore_tokenizers: bool = False,
) -> Prepared:
    """Open the models of a merge and plan it, from headers alone.

    Args:
        recipe: see `RecipeLike`.
        seed: overrides the recipe's.
        allow_config_conflicts: as in `MergeOptions`.
        unsafe_ignore_tokenizers: as in `MergeOptions`.

    Raises:
        MergekitRayError: the recipe or the seed is wrong, or the models are not there or do not fit together.
    """
    checked = check_plannable(checked_recipe(recipe))
    if seed is not None:
        checked = _seeded(checked, parse_seed(seed))
    check_stage_names(checked)
    checkpoints = open_models(referenced_models(checked), stage_names(checked), allow_raw=True)
    plan = make_plan(
        checked,
        checkpoints,
        allow_config_conflicts=allow_config_conflicts,
        unsafe_ignore_tokenizers=unsafe_ignore_tokenizers,
    )
    return Prepared(checked, checkpoints, plan, allow_config_conflicts, unsafe_ignore_tokenizers)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    if isinstance(recipe, StagedRecipe):
        return recipe.model_copy(update={"stages": tuple(_seeded(stage, seed) for stage in recipe.stages)})
    changed: dict[str, Any] = {"seed": seed}
    if isinstance(recipe, MoeRecipe) and recipe.backbone is not None:
        changed["backbone"] = _seeded(recipe.backbone, seed)
    return recipe.model_copy(update=changed)


def make_routers(
    recipe: MoeRecipe, checkpoints: Mapping[ModelReference, Checkpoint], options: MergeOptions
) -> RouterVectors:
    """The routers of a recipe: new ones, or rows for existing ones; on Ray or here, on the device asked for.

    Raises:
        MergekitRayError: see `routing.routers.routers`.
    """
    # The base model's layers run in transformers, which only recipes with prompts pay for.
    from mergekit_ray.routing.routers import routers as make  # noqa: PLC0415
    from mergekit_ray.routing.spread import Here  # noqa: PLC0415

    if recipe.add_to_base:
        from mergekit_ray.routing.growth import grown_routers as make  # noqa: PLC0415

    if not wants_ray(options.executor, options.address) or not recipe.gate_mode.needs_states:
        return make(recipe, checkpoints, spread=Here(resolve(options.device)))
    from mergekit_ray.executors.ray_cluster import Cluster  # noqa: PLC0415
    from mergekit_ray.routing.ray_spread import OnRay  # noqa: PLC0415

    with contextlib.closing(Cluster(options.address)) as cluster:
        spread = OnRay.over(cluster.nodes(), options.device, options.num_workers)
        return make(recipe, checkpoints, spread=spread)
