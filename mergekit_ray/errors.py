"""The errors that callers may want to catch, under one name: `mergekit_ray.errors`. See `core.errors` for the tree."""

from mergekit_ray.config.load import RecipeWarning
from mergekit_ray.core.errors import (
    CheckpointError,
    ConfigError,
    InternalError,
    Interrupted,
    MergeError,
    MergekitRayError,
    ModelError,
    PlanError,
    Problem,
    StorageError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "InternalError",
    "Interrupted",
    "MergeError",
    "MergekitRayError",
    "ModelError",
    "PlanError",
    "Problem",
    "RecipeWarning",
    "StorageError",
]
