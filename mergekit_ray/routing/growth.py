"""New rows for existing routers: as long as the rows beside them, and distinct from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError
from mergekit_ray.planning.make import models_of
from mergekit_ray.planning.moe.growth import Mixture
from mergekit_ray.routing.layers import read_tensors
from mergekit_ray.routing.routers import LARGEST_CONDITION, Routers, in_words, routers
from mergekit_ray.routing.spread import Spread

_CLOSE_COSINE: Final = (LARGEST_CONDITION**2 - 1) / (LARGEST_CONDITION**2 + 1)
"""Two unit vectors have condition number √((1+c)/(1−c)), with c their cosine."""


def grown_routers(
    recipe: MoeRecipe, checkpoints: Mapping[ModelReference, Checkpoint], *, spread: Spread | None = None
) -> Routers:
    """What the rows of new experts are made of.

    A router chooses a longer row more often for every token, so new rows get the mean length of the layer's rows. Rows
    of random modes are drawn when the weights are written.

    Args:
        recipe: with ``add_to_base``.
        checkpoints: at least the base model.
        spread: see `routing.routers`.

    Raises:
        ModelError: a router of the base model is not finite; else as `routing.routers`.
        CheckpointError, StorageError: the base model could not be read.
    """
    checkpoint = checkpoints[recipe.base_model]
    mixture = Mixture(models_of({recipe.base_model: checkpoint})[recipe.base_model])
    present = _rows(checkpoint, mixture.routers())
    lengths = {layer: float(np.linalg.norm(rows, axis=1).mean()) for layer, rows in present.items()}
    if not recipe.gate_mode.needs_prompts:
        return Routers({}, lengths=lengths)
    made = routers(recipe, checkpoints, spread=spread)
    vectors = {layer: made.vectors[layer] for layer in present}
    return Routers(vectors, lengths=lengths, warnings=[*made.warnings, *_close_warnings(present, vectors)])


def _rows(checkpoint: Checkpoint, names: Mapping[int, str]) -> dict[int, np.ndarray]:
    """Routers by layer: float64 [num_experts, hidden]."""
    read = read_tensors(checkpoint, {str(layer): name for layer, name in names.items()})
    found = {layer: read[str(layer)].to(torch.float64).numpy() for layer in names}
    for layer, rows in found.items():
        if not np.isfinite(rows).all():
            raise ModelError(
                f"{names[layer]} is not finite",
                where=checkpoint.reference,
                remedy="the base model's weights are damaged: download it again",
            )
    return found


def _close_warnings(present: Mapping[int, np.ndarray], vectors: Mapping[int, np.ndarray]) -> Sequence[str]:
    """Say which new rows point where an existing row does."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer, rows in present.items():
        lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        cosines = vectors[layer].astype(np.float64) @ (rows / lengths).T
        for new, old in np.argwhere(cosines > _CLOSE_COSINE):
            found.setdefault((int(new), int(old)), []).append(layer)
    return [
        f"experts[{new}]: its routers of {in_words(layers)} can hardly be told apart from those of expert {old} that "
        "is there already: give it prompts that differ more, negative prompts, or train the routers"
        for (new, old), layers in found.items()
    ]
