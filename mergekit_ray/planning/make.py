"""Recipe + headers -> plan. Pure: no weight is read, nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from mergekit_ray.architectures.anatomy import anatomy, opaque
from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.fields import ComputeDType
from mergekit_ray.config.load import Recipe
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.stages import Stage, StagedRecipe
from mergekit_ray.config.written import written_by_author
from mergekit_ray.config.yaml_source import STAGES
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergekitRayError, PlanError
from mergekit_ray.core.expressions import Expression, loads
from mergekit_ray.core.plan import InputFile, InputModel, Plan, SideFile
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.moe.experts import Routing
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.quantised import weights_of
from mergekit_ray.planning.stages.build import Allowed, Built, build, referenced
from mergekit_ray.planning.stages.model import model_of, with_adapter
from mergekit_ray.planning.stages.raw import build_raw, is_raw, max_shard_bytes
from mergekit_ray.planning.weights import Weights
from mergekit_ray.tokenizers.chat.templates import AUTO, NAMED


def check_plannable(recipe: Recipe) -> Recipe:
    """Refuse what recipes can say and this version cannot plan, before any model is looked for.

    Raises:
        PlanError: naming the part of the recipe.
    """
    stages = stages_of(recipe)
    for stage in stages:
        if not isinstance(stage, MoeRecipe) or not (stage.gate_mode.needs_prompts or stage.add_to_base):
            continue
        if stage.gate_mode.needs_prompts and stage.base_model.lora is not None:
            raise PlanError(
                "routers are computed with base_model's own layers, without its adapter",
                where=f"base_model {stage.base_model}",
                remedy="merge the adapter into the base first (merge_method: passthrough) and name the result",
            )
        if stage is not stages[-1] or (isinstance(recipe, StagedRecipe) and recipe.is_stage(stage.base_model)):
            raise PlanError(
                f"{'`add_to_base`' if stage.add_to_base else 'a router made from prompts'} needs a base model that is "
                "stored, and a mixture that is the last stage",
                where=f"base_model {stage.base_model}",
                remedy="write this stage as a recipe of its own, and name its output in the next one",
            )
    return recipe


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The merges of a recipe, each after those that it merges."""
    return recipe.ordered if isinstance(recipe, StagedRecipe) else (recipe,)


def stage_names(recipe: Recipe) -> Collection[str]:
    """What models of a recipe are called that are stages of it."""
    return recipe.named.keys() if isinstance(recipe, StagedRecipe) else ()


def referenced_models(recipe: Recipe) -> list[ModelReference]:
    """Every model whose files are needed, in order of appearance; of the last stage, the donor first.

    Stages are among them where an adapter is applied to them, see `checkpoint.models.open_models`.
    """
    names = stage_names(recipe)
    found = [reference for stage in stages_of(recipe) for reference in referenced(stage)]
    return list(dict.fromkeys(each for each in found if each.lora is not None or each.path not in names))


def make_plan(
    recipe: Recipe,
    checkpoints: Mapping[ModelReference, Checkpoint],
    routing: Routing | None = None,
    *,
    allow_config_conflicts: bool = False,
    unsafe_ignore_tokenizers: bool = False,
) -> Plan:
    """Plan a merge.

    Args:
        recipe: validated.
        checkpoints: the opened headers of every model of `referenced_models`.
        routing: makes routers from prompts, where the recipe has them; without it they are zero.
        allow_config_conflicts: merge models whose configs contradict each other, with warnings.
        unsafe_ignore_tokenizers: merge rows of embeddings even if they belong to different tokens, with warnings.

    Raises:
        ModelError, PlanError, CheckpointError: the models do not fit together, or the recipe does not fit them.
    """
    stages = stages_of(check_plannable(recipe))
    allowed = Allowed(allow_config_conflicts, unsafe_ignore_tokenizers)
    names = stage_names(recipe)
    there = {reference: checkpoint for reference, checkpoint in checkpoints.items() if reference.path not in names}
    stored = {wide: models_of(there, wide=wide) for wide in dict.fromkeys(map(_is_wide, stages))}
    made: dict[ModelReference, Model] = {}
    keys: dict[ModelReference | None, str] = {}

    def models_for(stage: Stage) -> dict[ModelReference, Model]:
        found = {**stored[_is_wide(stage)], **made}
        for reference in referenced(stage):
            if reference.lora is not None and (below := made.get(replace(reference, lora=None))) is not None:
                key = keys.setdefault(reference.lora, f"b{len(keys)}")
                found[reference] = with_adapter(below, reference, checkpoints[reference], key, wide=_is_wide(stage))
        return found

    templates: dict[int, str | None] = {}
    warnings: list[str] = []
    dropped: dict[str, str] = {}
    for i, stage in enumerate(stages[:-1]):
        with _naming(stage):
            built = _built(stage, models_for(stage), allowed, dtype=_handed_on(stage))
        assert stage.name is not None  # what nothing merges is not among them
        made[ModelReference(stage.name)] = model_of(f"s{i}", stage.name, built)
        templates[id(stage)] = built.template
        warnings += [f"stage {stage.name}: {warning}" for warning in built.warnings]
        dropped |= {f"stage {stage.name}: {name}": reason for name, reason in built.lowering.dropped.items()}
    last = stages[-1]
    with _naming(last) if len(stages) > 1 else nullcontext():
        models = models_for(last)
        built = _built(last, models, allowed, routing)
    lowering = built.lowering
    text = written_by_author(recipe, recipe.to_data())
    inputs = inputs_of(models, lowering.expressions.values())
    if isinstance(last, MoeRecipe) and last.gate_mode.needs_prompts:
        # What its routers are made of, whether or not a tensor is made of it too.
        inputs |= _whole(models[last.base_model])
    return Plan(
        inputs=inputs,
        shards=partition(
            lowering.groups,
            lowering.expressions,
            max_shard_bytes(last, built),
            built.stem,
            metadata=built.metadata,
            is_numbered=not built.is_single,
        ),
        config=built.config,
        side_files=tuple(built.side_files),
        recipe=recipe_as_data(recipe, {**templates, id(last): built.template}),
        seed=last.seed,
        generated_files=lowering.files,
        dropped={**dropped, **lowering.dropped},
        aliased=lowering.aliased,
        warnings=tuple(dict.fromkeys([*warnings, *built.warnings])),
        recipe_text=None if text is None else text.text,
        recipe_changes=() if text is None else text.changes,
        stage=None if text is None else text.stage,
    )


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Errors say of which stage they are."""
    try:
        yield
    except MergekitRayError as error:
        place = "the last stage" if stage.name is None else f"stage {stage.name}"
        error.where = place if error.where is None else f"{place}: {error.where}"
        raise


def _built(
    stage: Stage,
    models: Mapping[ModelReference, Model],
    allowed: Allowed,
    routing: Routing | None = None,
    *,
    dtype: DType | None = None,
) -> Built:
    if is_raw(stage, models):
        return build_raw(stage, models, dtype=dtype)
    return build(stage, models, routing, allowed, dtype=dtype)


def _handed_on(stage: Stage) -> DType | None:
    """The precision in which a stage that is not the last hands its tensors on; None for what it says."""
    if not isinstance(stage, DenseRecipe) or not stage.keep_precision:
        return None
    return DType.F64 if _is_wide(stage) else DType.F32


def _is_wide(stage: Stage) -> bool:
    """Whether adapters are applied in float64."""
    return stage.compute_dtype is ComputeDType.FLOAT64


def recipe_as_data(recipe: Recipe, templates: Mapping[int, str | None]) -> dict[str, Any]:
    """The recipe as plain data without what does not change the result (where it is written).

    Args:
        recipe: any.
        templates: by the ``id`` of each stage, the chat template that it asks for, in full.
    """
    if isinstance(recipe, StagedRecipe):
        return {STAGES: [recipe_as_data(stage, templates) for stage in recipe.stages]}
    data, template = recipe.to_data(), templates.get(id(recipe))
    data.pop("output", None)
    part = data if "chat_template" in data else data.get("backbone", {})
    if template is not None and part["chat_template"].strip() not in (AUTO, *NAMED):
        part["chat_template"] = template
    _sort_parameters(data)
    return data


def _sort_parameters(data: Any) -> None:
    """Order the names of parameters, in place: in which order they were written decides nothing."""
    if isinstance(data, list):
        for item in data:
            _sort_parameters(item)
    elif isinstance(data, dict):
        if isinstance(data.get("parameters"), dict):
            data["parameters"] = dict(sorted(data["parameters"].items()))
        for value in data.values():
            _sort_parameters(value)


def models_of(checkpoints: Mapping[ModelReference, Checkpoint], *, wide: bool = False) -> dict[ModelReference, Model]:
    """The models as planning sees them. Several adapters on one base read it under one key, and so once.

    Args:
        checkpoints: the opened headers.
        wide: adapters are applied in float64.

    Raises:
        ModelError, CheckpointError: a model's tensors, or an adapter's, make no sense.
    """
    models = {}
    base_keys: dict[ModelReference, str] = {}
    adapter_keys: dict[ModelReference, str] = {}
    for i, (reference, checkpoint) in enumerate(checkpoints.items()):
        where = f"model {reference}"
        base_key = base_keys.setdefault(replace(reference, lora=None), f"m{i}")
        weights: Weights = weights_of(base_key, checkpoint, where)
        if isinstance(checkpoint, AdaptedCheckpoint):
            assert reference.lora is not None
            adapter_key = adapter_keys.setdefault(reference.lora, f"a{len(adapter_keys)}")
            view = LoraWeights(weights, checkpoint.config, adapter_key, checkpoint.adapter, wide=wide)
            weights, checkpoint = view, replace(checkpoint, config=view.config)  # noqa: PLW2901
        parts = opaque(weights.specs) if checkpoint.is_raw else anatomy(weights.specs, checkpoint.config, where)
        models[reference] = Model(f"m{i}", reference, checkpoint, weights, parts, side_files=_beside(weights))
    return models


def _beside(weights: Weights) -> tuple[SideFile, ...]:
    return tuple(
        SideFile(key, InputFile(stat.name, stat.num_bytes, stat.version))
        for key, part in weights.inputs.items()  # an adapter after its base
        for stat in part.side_files
    )


def inputs_of(models: Mapping[ModelReference, Model], expressions: Iterable[Expression]) -> dict[str, InputModel]:
    """Everything that is read from, with the files that are really read."""
    checkpoints = {key: c for model in models.values() for key, c in model.weights.inputs.items()}
    files: dict[str, set[str]] = {key: set() for key in checkpoints}
    for expression in expressions:
        for load in loads(expression):
            files[load.model].add(load.location.file)
    return {
        key: InputModel(
            key=key,
            reference=checkpoint.reference,
            uri=checkpoint.source.uri,
            files={
                name: InputFile(name, checkpoint.files[name].num_bytes, checkpoint.files[name].version)
                for name in sorted(files[key])
            },
        )
        for key, checkpoint in checkpoints.items()
    }


def _whole(model: Model) -> dict[str, InputModel]:
    """A model, read from with all its weight files."""
    return {
        key: InputModel(
            key=key,
            reference=checkpoint.reference,
            uri=checkpoint.source.uri,
            files={name: InputFile(name, stat.num_bytes, stat.version) for name, stat in checkpoint.files.items()},
        )
        for key, checkpoint in model.weights.inputs.items()
    }
