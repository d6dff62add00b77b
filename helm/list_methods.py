"""Generates the list of merge methods that the chart accepts: ``python -m helm.list_methods``.

It has this package's methods, not those of plugins that happen to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from mergekit_ray.config.recipe import MOE_METHOD
from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.registry import METHODS, Registry

FILE: Final = Path(__file__).with_name("mergekit-ray") / "files" / "methods.json"


def text(methods: Registry[type[MethodDeclaration]] = METHODS) -> str:
    """The file: a sorted list in JSON."""
    own = [name for name in methods.names() if methods.get(name).__module__.startswith("mergekit_ray.")]
    return json.dumps(sorted([*own, MOE_METHOD]), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
