"""Recipe + headers -> plan. Pure: no weight is read, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.architectures.quantisation_config import SIDE_FILES
from mergekit_ray.architectures.sizes import misfits
from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.diffusers import is_of_diffusers
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.fields import ComputeDType
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Expression, loads
from mergekit_ray.core.plan import DIFFUSERS_STEM, STEM, InputFile, InputModel, Plan, SideFile
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.agreement import check_agreement
from mergekit_ray.planning.beside import check_sizes, module_warnings, side_warnings
from mergekit_ray.planning.dense import lower, rules_of
from mergekit_ray.planning.layer_order import check_is_counted, check_layer_order, check_nothing_by_layer
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.lowering import Arithmetic, Lowering, Model
from mergekit_ray.planning.moe.experts import COMPUTE_DTYPES, Routing
from mergekit_ray.planning.moe.lower import lower_moe
from mergekit_ray.planning.output_config import output_config, without_beyond
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.quantised import leftover_warnings, quantisation_of, weights_of
from mergekit_ray.planning.tokenizer import check_tokenizers, part_on_tokens, tokenizer_of
from mergekit_ray.planning.towers import set_tower
from mergekit_ray.planning.weights import Weights
from mergekit_ray.tokenizers.chat.templates import AUTO, NAMED

Recipe = DenseRecipe | MoeRecipe


def check_plannable(recipe: Recipe) -> Recipe:
    """Refuse what recipes can say and this version cannot plan, before any model is looked for.

    Raises:
        PlanError: naming the part of the recipe.
    """
    if isinstance(recipe, MoeRecipe) and recipe.base_model.lora is not None and recipe.gate_mode.needs_prompts:
        raise PlanError(
            "routers are computed with base_model's own layers, without its adapter",
            where=f"base_model {recipe.base_model}",
            remedy="merge the adapter into the base first (merge_method: passthrough) and name the result",
        )
    return recipe


def referenced_models(recipe: Recipe) -> list[ModelReference]:
    """Every model whose files are needed, in order of appearance; the donor first."""
    merged = recipe.model_references() if isinstance(recipe, MoeRecipe) else _merged(recipe)
    vocabulary = part_on_tokens(recipe).vocabulary
    more = () if vocabulary is None else vocabulary.model_references()
    return list(dict.fromkeys([recipe.donor, *merged, *more]))


def _experts(recipe: Recipe, models: Mapping[ModelReference, Model]) -> list[Model]:
    """The models that experts are made of, which all get the donor's tokens."""
    if not isinstance(recipe, MoeRecipe):
        return []
    return [models[expert.source_model] for expert in (*recipe.experts, *(recipe.shared_experts or ()))]


def _merged(recipe: DenseRecipe) -> list[ModelReference]:
    """The models that are merged, or bases of methods that have one, in order of appearance."""
    parts = [part for module in normalise(recipe) for part in module.slices]
    named = [[*(source.model for source in part.inputs), *([] if part.base is None else [part.base])] for part in parts]
    return list(dict.fromkeys(model for of_part in named for model in of_part))


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
    recipe = check_plannable(recipe)
    stored_models = models_of(checkpoints, wide=recipe.compute_dtype is ComputeDType.FLOAT64)
    warnings = check_agreement(recipe, stored_models, allow_conflicts=allow_config_conflicts)
    tokenizer = tokenizer_of(recipe, stored_models)
    models = tokenizer.models
    donor = models[recipe.donor]
    donor_config = donor.checkpoint.config
    if isinstance(recipe, MoeRecipe):
        stored = recipe.dtype
        lowering, donor_config = lower_moe(recipe, models, routing)
    else:
        stored = recipe.out_dtype or recipe.dtype
        arithmetic = Arithmetic(
            stored=stored,
            inputs=recipe.dtype,
            compute=COMPUTE_DTYPES[recipe.compute_dtype],
            seed=recipe.seed,
        )
        rules = rules_of(recipe)
        lowering = lower(normalise(recipe), METHODS.get(recipe.merge_method), models, donor, arithmetic, rules)
    lowering.vocab_size = tokenizer.rows or lowering.vocab_size
    lowering.files |= tokenizer.files
    warnings += tokenizer.warnings
    if not tokenizer.is_built:
        sharing = list(lowering.vocabulary.values())
        embedding = donor.anatomy.embedding
        rows = lowering.vocab_size or (0 if embedding is None else donor.weights.specs[embedding].shape[0])
        warnings += check_tokenizers(donor, sharing, _experts(recipe, models), rows, ignore=unsafe_ignore_tokenizers)
    if not lowering.expressions:
        raise PlanError("the recipe makes no tensors", remedy="check its slices and modules against the models")
    stem = DIFFUSERS_STEM if is_of_diffusers(donor.checkpoint.config) else STEM
    shards = partition(lowering.groups, lowering.expressions, recipe.output.max_shard_size, stem)
    warnings += lowering.warnings
    for model in models.values():
        warnings += model.checkpoint.warnings
        for name in model.checkpoint.unindexed:
            lowering.dropped[f"{model.reference}: {name}"] = "in a weight file, but not in the checkpoint's index"
        found = quantisation_of(model.checkpoint, where := f"model {model.reference}")
        if found is not None:
            warnings += leftover_warnings(found, where)
            lowering.dropped |= {f"{model.reference}: {name}": reason for name, reason in found.dropped.items()}
    # diffusers' configs say nothing of dtypes.
    dtype = None if stem == DIFFUSERS_STEM else stored or _most_common_dtype(lowering)
    config = _config_of(lowering, donor, donor_config, dtype)
    for part in donor.weights.inputs.values():
        check_sizes(part)
    warnings += [
        f"config.json of {model.reference} {misfit}"
        for model in stored_models.values()
        for misfit in misfits(model.anatomy, model.weights.specs, model.checkpoint.config)
    ]
    warnings += module_warnings(donor.checkpoint, [m.checkpoint for m in models.values() if m is not donor])
    warnings += side_warnings(donor.checkpoint, config, lowering.files)
    warnings += _useless_filters(recipe, [*lowering.expressions, *lowering.aliased])
    inputs = inputs_of(models, lowering.expressions.values())
    if isinstance(recipe, MoeRecipe) and recipe.gate_mode.needs_prompts:
        # What its routers are made of, whether or not a tensor is made of it too.
        inputs |= _whole(models[recipe.base_model])
    return Plan(
        inputs=inputs,
        shards=shards,
        config=config,
        side_files=tuple(
            SideFile(key, InputFile(stat.name, stat.num_bytes, stat.version))
            for key, part in donor.weights.inputs.items()  # an adapter after its base
            for stat in part.side_files
            if stat.name not in SIDE_FILES and stat.name not in lowering.files and not tokenizer.replaces(stat.name)
        ),
        recipe=recipe_as_data(recipe, tokenizer.template),
        seed=recipe.seed,
        generated_files=lowering.files,
        dropped=lowering.dropped,
        aliased=lowering.aliased,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _config_of(
    lowering: Lowering, donor: Model, donor_config: Mapping[str, Any], dtype: DType | None
) -> dict[str, Any]:
    """The output's ``config.json``, which has to describe the layers that were put together anew."""
    if lowering.layers is not None:
        check_is_counted(donor, lowering.layers)
        check_nothing_by_layer(donor, lowering.layers)
        check_layer_order(donor, lowering.layers)
    config = output_config(
        donor_config,
        layers=None if lowering.layers is None else [(m.checkpoint.config, i) for m, i in lowering.layers],
        stacks=donor.anatomy.stacks,
        main=donor.anatomy.main,
        dtype=dtype,
        tied=lowering.tied,
        vocab_size=lowering.vocab_size,
    )
    for stack, layers in lowering.towers.items():
        set_tower(config, donor, stack, layers)
    return config if lowering.keeps_beyond else without_beyond(config)


def _useless_filters(recipe: Recipe, names: Collection[str]) -> Iterator[str]:
    """Warnings of filters that are part of no output tensor's name, so that their values are used nowhere."""
    parts = {part for name in names for part in name.split(".")}
    for wanted in dict.fromkeys(_filters(recipe.to_data())):
        if wanted != "*" and not any(wanted in name for name in names):
            yield f"filter {wanted!r} is part of no tensor's name: its value is not used{nearest(wanted, parts)}"


def _filters(data: Any) -> Iterator[str]:
    """The filters of all values in a recipe."""
    if isinstance(data, list):
        for item in data:
            yield from _filters(item)
    elif isinstance(data, dict):
        if isinstance(data.get("filter"), str):
            yield data["filter"]
        for value in data.values():
            yield from _filters(value)


def recipe_as_data(recipe: Recipe, template: str | None = None) -> dict[str, Any]:
    """The recipe as plain data without what does not change the result (where it is written).

    Args:
        recipe: any.
        template: the chat template that it asks for, in full.
    """
    data = recipe.to_data()
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
        models[reference] = Model(
            f"m{i}", reference, checkpoint, weights, anatomy(weights.specs, checkpoint.config, where)
        )
    return models


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


def _most_common_dtype(lowering: Lowering) -> DType | None:
    """The dtype of most floating elements, which ``config.json`` states."""
    count: Counter[DType] = Counter()
    specs: list[TensorSpec] = [spec for group in lowering.groups for spec in group if spec.dtype.is_floating]
    for spec in specs:
        count[spec.dtype] += spec.num_elements
    return count.most_common(1)[0][0] if count else None
