"""One merge: from a recipe and the models that it names to tensors with their expressions, and files beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ray.architectures.quantisation_config import SIDE_FILES
from mergekit_ray.architectures.sizes import misfits
from mergekit_ray.checkpoint.diffusers import is_of_diffusers
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.stages import Stage
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import DIFFUSERS_STEM, STEM, SideFile
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec, matches
from mergekit_ray.planning.agreement import check_agreement
from mergekit_ray.planning.beside import check_sizes, module_warnings, side_warnings
from mergekit_ray.planning.dense import lower, rules_of
from mergekit_ray.planning.layer_order import check_is_counted, check_layer_order, check_nothing_by_layer
from mergekit_ray.planning.lowering import Arithmetic, Lowering, Model
from mergekit_ray.planning.moe.experts import COMPUTE_DTYPES, Routing
from mergekit_ray.planning.moe.lower import lower_moe
from mergekit_ray.planning.output_config import output_config, without_beyond
from mergekit_ray.planning.quantised import leftover_warnings, quantisation_of
from mergekit_ray.planning.tokenizer import check_tokenizers, part_on_tokens, tokenizer_of
from mergekit_ray.planning.towers import set_tower


@dataclass(frozen=True)
class Allowed:
    """What a user allows, see `MergeOptions`.

    Attributes:
        config_conflicts: merge models whose configs contradict each other, with warnings.
        other_tokens: merge rows of embeddings even if they belong to different tokens, with warnings.
    """

    config_conflicts: bool = False
    other_tokens: bool = False


@dataclass(frozen=True)
class Built:
    """What one merge makes.

    Attributes:
        lowering: its tensors; ``files`` are all texts beside the weights.
        models: by reference, as they were merged.
        config: the ``config.json``; empty if there is none.
        side_files: copied beside the weights.
        stem: what weight files are called.
        template: the chat template that the recipe asks for, in full.
        warnings: what the user should know.
        is_raw: there is no ``config.json``.
        metadata: of the weight files' headers; None for what transformers wants to see.
        is_single: its models are single files, and so is the result.
    """

    lowering: Lowering
    models: Mapping[ModelReference, Model]
    config: Mapping[str, Any]
    side_files: Sequence[SideFile]
    stem: str
    template: str | None
    warnings: Sequence[str]
    is_raw: bool = False
    metadata: Mapping[str, str] | None = None
    is_single: bool = False


def build(
    recipe: Stage,
    stored_models: Mapping[ModelReference, Model],
    routing: Routing | None,
    allowed: Allowed,
    *,
    dtype: DType | None = None,
) -> Built:
    """Lower a recipe.

    Args:
        recipe: validated.
        stored_models: every model that it names, and perhaps others.
        routing: makes routers from prompts, where the recipe has them; without it they are zero.
        allowed: what is let pass with a warning.
        dtype: of the result, in place of the recipe's.

    Raises:
        ModelError, PlanError, CheckpointError: the models do not fit together, or the recipe does not fit them.
    """
    stored_models = {reference: stored_models[reference] for reference in referenced(recipe)}
    warnings = check_agreement(recipe, stored_models, allow_conflicts=allowed.config_conflicts)
    tokenizer = tokenizer_of(recipe, stored_models)
    models = tokenizer.models
    donor = models[recipe.donor]
    donor_config = donor.checkpoint.config
    if isinstance(recipe, MoeRecipe):
        stored = dtype or recipe.dtype
        lowering, donor_config = lower_moe(recipe, models, routing)
    else:
        stored = dtype or recipe.out_dtype or recipe.dtype
        arithmetic = Arithmetic(
            stored=stored,
            inputs=recipe.dtype,
            compute=COMPUTE_DTYPES[recipe.compute_dtype],
            seed=recipe.seed,
        )
        rules = rules_of(recipe)
        lowering = lower(normalise(recipe), METHODS.get(recipe.merge_method), models, donor, arithmetic, rules)
    lowering.vocab_size = tokenizer.rows or lowering.vocab_size
    lowering.files |= {name: text for name, text in donor.files.items() if not tokenizer.replaces(name)}
    lowering.files |= tokenizer.files
    warnings += tokenizer.warnings
    if not tokenizer.is_built:
        sharing = list(lowering.vocabulary.values())
        embedding = donor.anatomy.embedding
        rows = lowering.vocab_size or (0 if embedding is None else donor.weights.specs[embedding].shape[0])
        warnings += check_tokenizers(donor, sharing, _experts(recipe, models), rows, ignore=allowed.other_tokens)
    if not lowering.expressions:
        raise PlanError("the recipe makes no tensors", remedy="check its slices and modules against the models")
    stem = DIFFUSERS_STEM if is_of_diffusers(donor.checkpoint.config) else STEM
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
    named = None if stem == DIFFUSERS_STEM else stored or _most_common_dtype(lowering)
    config = _config_of(lowering, donor, donor_config, named)
    check_sizes(donor)
    warnings += [
        f"config.json of {model.reference} {misfit}"
        for model in stored_models.values()
        for misfit in misfits(model.anatomy, model.weights.specs, model.checkpoint.config)
    ]
    warnings += module_warnings(donor.checkpoint, [m.checkpoint for m in models.values() if m is not donor])
    warnings += side_warnings(donor.checkpoint, config, lowering.files)
    warnings += useless_filters(recipe, [*lowering.expressions, *lowering.aliased])
    beside = [
        side
        for side in donor.side_files
        if side.file.name not in SIDE_FILES
        and side.file.name not in lowering.files
        and not tokenizer.replaces(side.file.name)
    ]
    return Built(lowering, models, config, beside, stem, tokenizer.template, tuple(dict.fromkeys(warnings)))


def referenced(recipe: Stage) -> list[ModelReference]:
    """Every model whose files are needed, in order of appearance; the donor first."""
    merged = recipe.model_references() if isinstance(recipe, MoeRecipe) else _merged(recipe)
    vocabulary = part_on_tokens(recipe).vocabulary
    more = () if vocabulary is None else vocabulary.model_references()
    return list(dict.fromkeys([recipe.donor, *merged, *more]))


def _experts(recipe: Stage, models: Mapping[ModelReference, Model]) -> list[Model]:
    """The models that experts are made of, which all get the donor's tokens."""
    if not isinstance(recipe, MoeRecipe):
        return []
    return [models[expert.source_model] for expert in (*recipe.experts, *(recipe.shared_experts or ()))]


def _merged(recipe: DenseRecipe) -> list[ModelReference]:
    """The models that are merged, or bases of methods that have one, in order of appearance."""
    parts = [part for module in normalise(recipe) for part in module.slices]
    named = [[*(source.model for source in part.inputs), *([] if part.base is None else [part.base])] for part in parts]
    return list(dict.fromkeys(model for of_part in named for model in of_part))


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


def useless_filters(recipe: Stage, names: Collection[str]) -> Iterator[str]:
    """Warnings of filters that match no output tensor, so that their values are used nowhere."""
    parts = {part for name in names for part in name.split(".")}
    for wanted in dict.fromkeys(_filters(recipe.to_data())):
        if wanted != "*" and not any(matches(wanted, name) for name in names):
            yield f"filter {wanted!r} matches no tensor's name: its value is not used{nearest(wanted, parts)}"


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


def _most_common_dtype(lowering: Lowering) -> DType | None:
    """The dtype of most floating elements, which ``config.json`` states."""
    count: Counter[DType] = Counter()
    specs: list[TensorSpec] = [spec for group in lowering.groups for spec in group if spec.dtype.is_floating]
    for spec in specs:
        count[spec.dtype] += spec.num_elements
    return count.most_common(1)[0][0] if count else None
