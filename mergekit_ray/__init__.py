"""mergekit-ray: merge LLM checkpoints of any size, on one machine or a Ray cluster.

import mergekit_ray

recipe = mergekit_ray.load_recipe("recipe.yml")
result = mergekit_ray.merge(recipe, "s3://bucket/merged")
result.load_tensor("model.norm.weight")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_ray.core.version import __version__ as __version__

if TYPE_CHECKING:
    from mergekit_ray import errors
    from mergekit_ray.config.fields import ComputeDType, OutputOptions
    from mergekit_ray.config.moe_recipe import ExpertRecipe, GateMode, MoeRecipe
    from mergekit_ray.config.recipe import DenseRecipe, InputModel, ModuleRecipe, SliceRecipe, SliceSource
    from mergekit_ray.config.reference import ModelReference
    from mergekit_ray.config.stages import StagedRecipe
    from mergekit_ray.config.tokenizer import ModelTokenEmbedding, TokenEmbedding, TokenizerOptions, ZeroEmbedding
    from mergekit_ray.config.transplant import TransplantOptions
    from mergekit_ray.core.dtypes import DType
    from mergekit_ray.core.plan import Plan
    from mergekit_ray.operations.convert import convert
    from mergekit_ray.operations.extract_lora import extract_lora
    from mergekit_ray.operations.extract_options import ExtractOptions
    from mergekit_ray.operations.extraction_report import ExtractResult
    from mergekit_ray.operations.inspect import Inspection, inspect
    from mergekit_ray.operations.merge import merge
    from mergekit_ray.operations.options import MergeOptions
    from mergekit_ray.operations.plan import plan
    from mergekit_ray.operations.recipes import load_recipe
    from mergekit_ray.operations.reproduce import Reproduction, reproduce
    from mergekit_ray.operations.run_plan import MergeResult
    from mergekit_ray.operations.tensors import Tensors
    from mergekit_ray.operations.transplant import transplant
    from mergekit_ray.operations.verify import Verification, VerifyOptions, verify
    from mergekit_ray.planning.extraction import Coverage
    from mergekit_ray.reporting.reporters import Reporter

__all__ = [
    "ComputeDType",
    "Coverage",
    "DType",
    "DenseRecipe",
    "ExpertRecipe",
    "ExtractOptions",
    "ExtractResult",
    "GateMode",
    "InputModel",
    "Inspection",
    "MergeOptions",
    "MergeResult",
    "ModelReference",
    "ModelTokenEmbedding",
    "ModuleRecipe",
    "MoeRecipe",
    "OutputOptions",
    "Plan",
    "Reporter",
    "Reproduction",
    "SliceRecipe",
    "SliceSource",
    "StagedRecipe",
    "Tensors",
    "TokenEmbedding",
    "TokenizerOptions",
    "TransplantOptions",
    "Verification",
    "VerifyOptions",
    "ZeroEmbedding",
    "__version__",
    "convert",
    "errors",
    "extract_lora",
    "inspect",
    "load_recipe",
    "merge",
    "plan",
    "reproduce",
    "transplant",
    "verify",
]

_HOMES = {
    "config.fields": ("ComputeDType", "OutputOptions"),
    "config.moe_recipe": ("ExpertRecipe", "GateMode", "MoeRecipe"),
    "config.recipe": ("DenseRecipe", "InputModel", "ModuleRecipe", "SliceRecipe", "SliceSource"),
    "config.reference": ("ModelReference",),
    "config.stages": ("StagedRecipe",),
    "config.tokenizer": ("ModelTokenEmbedding", "TokenEmbedding", "TokenizerOptions", "ZeroEmbedding"),
    "config.transplant": ("TransplantOptions",),
    "core.dtypes": ("DType",),
    "core.plan": ("Plan",),
    "operations.convert": ("convert",),
    "operations.extract_lora": ("extract_lora",),
    "operations.extract_options": ("ExtractOptions",),
    "operations.extraction_report": ("ExtractResult",),
    "operations.inspect": ("Inspection", "inspect"),
    "operations.merge": ("merge",),
    "operations.options": ("MergeOptions",),
    "operations.plan": ("plan",),
    "operations.recipes": ("load_recipe",),
    "operations.reproduce": ("Reproduction", "reproduce"),
    "operations.run_plan": ("MergeResult",),
    "operations.tensors": ("Tensors",),
    "operations.transplant": ("transplant",),
    "operations.verify": ("Verification", "VerifyOptions", "verify"),
    "planning.extraction": ("Coverage",),
    "reporting.reporters": ("Reporter",),
}

if not TYPE_CHECKING:  # to a type checker, a module that has one has every name

    def __getattr__(name: str) -> object:
        # Loaded on first use: importing the package must not cost torch's import.
        import importlib  # noqa: PLC0415 - only needed here

        if name == "errors":
            return importlib.import_module("mergekit_ray.errors")
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"mergekit_ray.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
