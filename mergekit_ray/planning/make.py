"""Recipe + headers -> plan. Pure: no weight is read, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.fields import ComputeDType
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import loads
from mergekit_ray.core.plan import InputFile, InputModel, Plan, SideFile
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.dense import lower
from mergekit_ray.planning.lowering import Arithmetic, Lowering, Model
from mergekit_ray.planning.output_config import output_config
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.weights import StoredWeights

_COMPUTE_DTYPES = {ComputeDType.FLOAT32: DType.F32, ComputeDType.FLOAT64: DType.F64, ComputeDType.INPUTS: None}


def check_plannable(recipe: DenseRecipe | MoeRecipe) -> DenseRecipe:
    """Refuse what recipes can say and this version cannot plan, before any model is looked for.

    Raises:
        PlanError: naming the part of the recipe.
    """
    if isinstance(recipe, MoeRecipe):
        raise PlanError(
            "this version reads and validates Mixture-of-Experts recipes, and cannot merge them yet",
            remedy="`mergekit-ray validate` checks the recipe; merging it comes with a later version",
        )
    for key in ("tokenizer", "tokenizer_source", "chat_template"):
        if getattr(recipe, key) is not None:
            raise PlanError(
                f"{key}: building a tokenizer or chat template is not supported yet",
                remedy=f"remove {key}: the tokenizer of base_model, or of the first model, is copied as it is",
            )
    for model in referenced_models(recipe):
        if model.lora is not None:
            raise PlanError(
                f"model {str(model)!r}: applying a LoRA is not supported yet",
                remedy="merge the adapter into its base first (PEFT's merge_and_unload) and name the result",
            )
    return recipe


def referenced_models(recipe: DenseRecipe) -> list[ModelReference]:
    """Every model whose files are needed, in order of appearance; the donor first."""
    found: dict[ModelReference, None] = {recipe.donor: None}
    for module in normalise(recipe):
        for part in module.slices:
            for source in part.inputs:
                found[source.model] = None
            if part.base is not None:
                found[part.base] = None
    return list(found)


def make_plan(recipe: DenseRecipe, checkpoints: Mapping[ModelReference, Checkpoint]) -> Plan:
    """Plan a dense merge.

    Args:
        recipe: validated.
        checkpoints: the opened headers of every model of `referenced_models`.

    Raises:
        ModelError, PlanError, CheckpointError: the models do not fit together, or the recipe does not fit them.
    """
    recipe = check_plannable(recipe)
    models = _models(checkpoints)
    modules = normalise(recipe)
    donor = models[recipe.donor]
    stored = recipe.out_dtype or recipe.dtype
    arithmetic = Arithmetic(
        stored=stored,
        inputs=recipe.dtype,
        compute=_COMPUTE_DTYPES[recipe.compute_dtype],
        seed=recipe.seed,
    )
    lowering = lower(modules, METHODS.get(recipe.merge_method), models, donor, arithmetic)
    if not lowering.expressions:
        raise PlanError("the recipe makes no tensors", remedy="check its slices and modules against the models")
    shards = partition(lowering.groups, lowering.expressions, recipe.output.max_shard_size)
    warnings = [*lowering.warnings]
    for model in models.values():
        warnings += model.checkpoint.warnings
        for name in model.checkpoint.unindexed:
            lowering.dropped[f"{model.reference}: {name}"] = "in a weight file, but not in the checkpoint's index"
    config = output_config(
        donor.checkpoint.config,
        layers=None if lowering.layers is None else [(m.checkpoint.config, i) for m, i in lowering.layers],
        dtype=stored or _most_common_dtype(lowering),
        tied=lowering.tied,
        vocab_size=lowering.vocab_size,
    )
    return Plan(
        inputs=_inputs(models, lowering),
        shards=shards,
        config=config,
        side_files=tuple(
            SideFile(donor.key, InputFile(stat.name, stat.num_bytes, stat.version))
            for stat in donor.checkpoint.side_files
        ),
        recipe=recipe_as_data(recipe),
        seed=recipe.seed,
        dropped=lowering.dropped,
        aliased=lowering.aliased,
        warnings=tuple(warnings),
    )


def recipe_as_data(recipe: DenseRecipe) -> dict[str, Any]:
    """The recipe as plain data without what does not change the result (where it is written)."""
    data = recipe.to_data()
    data.pop("output", None)
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


def _models(checkpoints: Mapping[ModelReference, Checkpoint]) -> dict[ModelReference, Model]:
    models = {}
    for i, (reference, checkpoint) in enumerate(checkpoints.items()):
        where = f"model {reference}"
        quantised = checkpoint.config.get("quantization_config")
        if isinstance(quantised, Mapping):
            raise ModelError(
                f"its weights are quantised ({quantised.get('quant_method', 'unknown method')}): "
                "an average of codes means nothing",
                where=where,
                remedy="name the unquantised checkpoint, or dequantise it first",
            )
        weights = StoredWeights(f"m{i}", checkpoint)
        models[reference] = Model(
            f"m{i}", reference, checkpoint, weights, anatomy(weights.specs, checkpoint.config, where)
        )
    return models


def _inputs(models: Mapping[ModelReference, Model], lowering: Lowering) -> dict[str, InputModel]:
    """Everything that is read from, with the files that are really read."""
    checkpoints = {key: c for model in models.values() for key, c in model.weights.inputs.items()}
    files: dict[str, set[str]] = {key: set() for key in checkpoints}
    for expression in lowering.expressions.values():
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


def _most_common_dtype(lowering: Lowering) -> DType | None:
    """The dtype of most floating elements, which ``config.json`` states."""
    count: Counter[DType] = Counter()
    specs: list[TensorSpec] = [spec for group in lowering.groups for spec in group if spec.dtype.is_floating]
    for spec in specs:
        count[spec.dtype] += spec.num_elements
    return count.most_common(1)[0][0] if count else None
