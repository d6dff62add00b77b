"""mergekit-ray: merge language-model checkpoints across a cluster.

import mergekit_ray

recipe = mergekit_ray.load_recipe("recipe.yml")
mergekit_ray.merge(recipe, "s3://bucket/merged")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "load_recipe", "merge", "plan"]

if TYPE_CHECKING:
    from mergekit_ray.runtime.api import merge, plan
    from mergekit_ray.runtime.recipes import load_recipe

_HOMES = {
    "load_recipe": "mergekit_ray.runtime.recipes",
    "merge": "mergekit_ray.runtime.api",
    "plan": "mergekit_ray.runtime.api",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must not cost torch's import.
    if name in _HOMES:
        import importlib  # noqa: PLC0415 - only needed here

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
