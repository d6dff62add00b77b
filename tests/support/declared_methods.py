"""Small declared methods, for tests that should not depend on which real ones there are."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, MethodDeclaration, Parameters
from mergekit_ray.core.registry import Registry

Methods = Registry[type[MethodDeclaration]]


class Weight(Parameters):
    weight: float = Field(description="weight")


class WeightDensity(Weight):
    density: float = Field(1.0, ge=0.0, le=1.0, description="density")


class Normalize(Parameters):
    normalize: bool = Field(True, description="normalize")


class Lambda(Normalize):
    lambda_: float = Field(1.0, alias="lambda", description="lambda")
    steps: int = Field(3, description="a whole number")


class T(Parameters):
    t: float = Field(description="t")


class Scale(Parameters):
    scale: float | None = Field(None, description="scale")


def declare(**attributes: Any) -> type[MethodDeclaration]:
    defaults = {"summary": "s", "formula": "f"}
    return type(attributes["name"], (MethodDeclaration,), defaults | attributes)


def declared_methods() -> Methods:
    """A registry of its own, which looks nowhere else."""
    registry: Methods = Registry("merge method", "mergekit_ray.methods", "none")
    registry._discovered = True
    for method in (
        declare(name="linear", model_parameters=Weight, global_parameters=Normalize),
        declare(name="ties", base=BaseUse.REQUIRED, model_parameters=WeightDensity, global_parameters=Lambda),
        declare(name="slerp", base=BaseUse.REQUIRED, base_is_input=True, max_models=1, global_parameters=T),
        declare(name="passthrough", max_models=1, model_parameters=Scale),
        declare(name="nuslerp", base=BaseUse.OPTIONAL, min_models=2, max_models=2, model_parameters=Weight),
        declare(name="model_stock", base=BaseUse.REQUIRED, min_models=2),
    ):
        registry.register(method.name)(method)
    return registry
