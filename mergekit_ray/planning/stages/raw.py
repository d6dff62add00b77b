"""One merge of models without ``config.json``: single files, and folders of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mergekit_ray.config.fields import DEFAULT_MAX_SHARD_BYTES
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.normal import NormalSlice, normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import gradients
from mergekit_ray.config.stages import Stage
from mergekit_ray.core.declaration import BaseUse, MethodDeclaration
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.plan import STEM
from mergekit_ray.core.registry import METHODS
from mergekit_ray.planning.cuts import cut_of
from mergekit_ray.planning.dense import rules_of
from mergekit_ray.planning.lowering import Arithmetic, Lowering, Model, Operand, Rules
from mergekit_ray.planning.moe.experts import COMPUTE_DTYPES
from mergekit_ray.planning.stages.build import Built, referenced, useless_filters
from mergekit_ray.planning.tensors import TensorLowering

_OF_CONTENT: Final = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that are digests of the tensors, and so wrong of any others."""


def is_raw(recipe: Stage, models: Mapping[ModelReference, Model]) -> bool:
    """Whether a recipe merges models without ``config.json``.

    Raises:
        ModelError: some have one.
    """
    named = [models[reference] for reference in referenced(recipe)]
    raw = [str(model.reference) for model in named if model.checkpoint.is_raw]
    others = [str(model.reference) for model in named if not model.checkpoint.is_raw]
    if raw and others:
        raise ModelError(
            f"{_listed(raw)} has no config.json, and {_listed(others)} has one: the two kinds cannot be merged",
            remedy="put a config.json beside the weights and name the folder; or, to merge tensors by their names "
            "alone, name the safetensors file of each model",
        )
    return bool(raw)


def build_raw(recipe: Stage, stored_models: Mapping[ModelReference, Model], *, dtype: DType | None = None) -> Built:
    """Lower a recipe whose models are all without ``config.json``. See `planning.stages.build.build`.

    Raises:
        ModelError: tensors that do not fit together.
        PlanError: the recipe says what needs a config.
    """
    models = {reference: stored_models[reference] for reference in referenced(recipe)}
    dense = _checked(recipe, next(iter(models.values())))
    donor = models[dense.donor]
    arithmetic = Arithmetic(
        stored=dtype or dense.out_dtype or dense.dtype,
        inputs=dense.dtype,
        compute=COMPUTE_DTYPES[dense.compute_dtype],
        seed=dense.seed,
    )
    method = METHODS.get(dense.merge_method)
    [module] = normalise(dense)
    [piece] = module.slices
    listed = [model.model for model in dense.models or ()]
    lowering = _lower(piece, listed, method, models, donor, arithmetic, rules_of(dense))
    if not lowering.expressions:
        raise PlanError(
            "the recipe makes no tensors", remedy="the models have no tensor in common; compare the names in them"
        )
    warnings = [*(w for model in models.values() for w in model.checkpoint.warnings), *lowering.warnings]
    warnings += useless_filters(recipe, lowering.expressions)
    files = [model.checkpoint.single_file for model in models.values()]
    return Built(
        lowering=lowering,
        models=models,
        config={},
        side_files=donor.side_files,
        stem=_stem(files),
        template=None,
        warnings=tuple(dict.fromkeys(warnings)),
        is_raw=True,
        metadata={"format": "pt"} | {k: v for k, v in donor.checkpoint.metadata.items() if k not in _OF_CONTENT},
        is_single=None not in files,
    )


def _checked(recipe: Stage, model: Model) -> DenseRecipe:
    """The recipe, which says nothing that needs a config.

    Raises:
        PlanError: it does.
    """
    where = f"model {model.reference}, which has no config.json"
    remedy = "put a config.json beside the weights and name the folder"
    if isinstance(recipe, MoeRecipe):
        raise PlanError("a Mixture of Experts is built of models with a config.json", where=where, remedy=remedy)
    for key in ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template"):
        if getattr(recipe, key) is not None:
            raise PlanError(
                f"`{key}` needs models with a config.json", where=where, remedy=f"{remedy}, or use `models`"
            )
    levels = [recipe.parameters, *(each.parameters for each in recipe.models or ())]
    for name, setting in ((name, setting) for level in levels for name, setting in level.items()):
        if gradients(setting):
            raise PlanError(
                f"the values of {name!r} are a list, to be interpolated over layers, and nothing says which layers "
                "these tensors are of",
                where=where,
                remedy=f"give one value, or choose by names: {name}: [{{filter: part of a name, value: 0.5}}, ...]",
            )
    merged = {each.model for each in recipe.models or ()}
    base = recipe.base_model
    if base is not None and base not in merged and METHODS.get(recipe.merge_method).base is BaseUse.FORBIDDEN:
        raise PlanError(
            f"{recipe.merge_method} has no base model, and {base} is not among the `models`",
            where="base_model",
            remedy="list it among the `models` to merge it, as mergekit-pytorch would, or remove `base_model`",
        )
    return recipe


def _lower(
    piece: NormalSlice,
    listed: Sequence[ModelReference],
    method: type[MethodDeclaration],
    models: Mapping[ModelReference, Model],
    donor: Model,
    arithmetic: Arithmetic,
    rules: Rules,
) -> Lowering:
    """Lower a recipe of ``models``, name by name.

    As ``mergekit-pytorch`` does, the listed models decide which tensors there are; a base beside them adds none.

    Args:
        piece: the models that are merged, and the base.
        listed: the models as the recipe lists them, the base too if it is one of them.
        method: the recipe's merge method.
        models: every model that it names.
        donor: whose tensors are copied where they are not merged.
        arithmetic: dtypes and seed.
        rules: which tensors are not merged, and what becomes of those that only some models have.

    Raises:
        ModelError: tensors that do not fit together; all mismatches are listed.
        PlanError: parameters with which nothing can be merged.
    """
    result = Lowering()
    tensors = TensorLowering(method, arithmetic, rules, models, donor, result, None)
    cut = cut_of(piece, models, method, donor, None, is_only=True)
    names = dict.fromkeys(name for reference in listed for name in models[reference].weights.specs)
    of_base = [] if cut.base is None else [name for name in cut.base.weights.specs if name not in names]
    if rules.missing in ("base", "first"):
        names |= dict.fromkeys(of_base)
    for name in names:
        operands = [Operand(model, name) for model in cut.sources]
        base = None if cut.base is None else Operand(cut.base, name)
        added = tensors.add(name, operands, base, cut, 0.0)
        if added:
            result.groups.append(added)
    for name in of_base:
        if name not in names and cut.base is not None:
            tensors.partial.leave_out_base(name, Operand(cut.base, name), [Operand(m, name) for m in cut.sources])
    tensors.mismatches.raise_if_any()
    tensors.settle()
    return result


def _stem(files: Sequence[str | None]) -> str:
    """What the output's file is called: as all inputs are, if these are files, or ``model``."""
    [name] = set(files) if len(set(files)) == 1 else [None]
    return STEM if name is None else name.rpartition(".")[0]


def max_shard_bytes(recipe: Stage, built: Built) -> int | None:
    """Most bytes in a file of the output; None for one file, however large."""
    wanted = recipe.output.max_shard_size
    return None if built.is_single and wanted == DEFAULT_MAX_SHARD_BYTES else wanted


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
