"""Recipes: mergekit's YAML, and ours, as checked data.

`load_recipe` reads a file, a text or a mapping; `normalise` brings a dense recipe into the one form that planning sees;
`Resolver` gives a method's parameters at each output tensor.
"""

from mergekit_ray.config.fields import DEFAULT_MAX_SHARD_BYTES, ComputeDType, OutputOptions
from mergekit_ray.config.load import RecipeWarning, check_recipe, load_recipe
from mergekit_ray.config.moe_recipe import ExpertRecipe, GateMode, MoeRecipe
from mergekit_ray.config.normal import NormalModule, NormalSlice, NormalSource, normalise
from mergekit_ray.config.recipe import DenseRecipe, InputModel, ModuleRecipe, SliceRecipe, SliceSource
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import MISSING, Resolver, gradient_position, resolve
from mergekit_ray.config.sizes import format_size, parse_size

__all__ = [
    "DEFAULT_MAX_SHARD_BYTES",
    "MISSING",
    "ComputeDType",
    "DenseRecipe",
    "ExpertRecipe",
    "GateMode",
    "InputModel",
    "ModelReference",
    "ModuleRecipe",
    "MoeRecipe",
    "NormalModule",
    "NormalSlice",
    "NormalSource",
    "OutputOptions",
    "RecipeWarning",
    "Resolver",
    "SliceRecipe",
    "SliceSource",
    "check_recipe",
    "format_size",
    "gradient_position",
    "load_recipe",
    "normalise",
    "parse_size",
    "resolve",
]
