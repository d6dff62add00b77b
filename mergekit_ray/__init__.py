"""mergekit-ray: merge language-model checkpoints across a cluster.

import mergekit_ray

recipe = mergekit_ray.load_recipe("recipe.yml")
mergekit_ray.merge(recipe, "s3://bucket/merged")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_ray.core.version import __version__ as __version__

__all__ = ["__version__", "load_recipe", "merge", "plan"]

if TYPE_CHECKING:
    from mergekit_ray.operations.merge import merge
    from mergekit_ray.operations.plan import plan
    from mergekit_ray.operations.recipes import load_recipe

_HOMES = {
    "load_recipe": "mergekit_ray.operations.recipes",
    "merge": "mergekit_ray.operations.merge",
    "plan": "mergekit_ray.operations.plan",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must not cost torch's import.
    if name in _HOMES:
        import importlib  # noqa: PLC0415 - only needed here

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
