"""`recipe shuffle`: a recipe whose every layer is drawn from one of several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from mergekit_ray.config.accepted import ModelLike
from mergekit_ray.config.recipe import DenseRecipe, SliceRecipe, SliceSource
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.operations.inspect import inspect


def shuffle(
    models: Sequence[ModelLike],
    weights: Sequence[float] = (),
    *,
    seed: int = 0,
    full_random: bool = False,
    dtype: str | None = None,
) -> DenseRecipe:
    """A passthrough recipe of as many layers as the models have, each drawn from one of them.

    Args:
        models: as a recipe names them; their headers are read.
        weights: how likely each is drawn, in relation to the others; empty for equal ones.
        seed: of the draw.
        full_random: draw the layer's index, too; else every layer stays at its place.
        dtype: of the recipe; None for the models' own.

    Raises:
        ConfigError: no model, or weights that do not fit.
        ModelError, CheckpointError, StorageError: a model cannot be read, or their numbers of layers differ.
    """
    if not models:
        raise ConfigError("no model to draw layers from", remedy="name at least one")
    if weights and len(weights) != len(models):
        raise ConfigError(
            f"{len(weights)} weights for {len(models)} models", remedy="give every model a weight, or none"
        )
    if any(not 0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
        raise ConfigError(
            f"these cannot be weights: {', '.join(map(str, weights))}",
            remedy="a weight is a number of at least 0, and one is above 0",
        )
    found = [inspect(model) for model in models]
    counts = {each.model: each.num_layers for each in found}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {model}" for model, count in counts.items())
        raise ModelError(f"the models' numbers of layers differ: {told}", remedy="shuffle models of equal depth")
    [num_layers] = set(counts.values())
    if num_layers == 0:
        raise ModelError("the models have no layers", where=next(iter(counts)))
    random = Random(seed)
    drawn: list[tuple[str, int, int]] = []
    for place in range(num_layers):
        [model] = random.choices([each.model for each in found], weights or None)
        layer = random.randrange(num_layers) if full_random else place
        if drawn and drawn[-1][0] == model and drawn[-1][2] == layer:
            drawn[-1] = (model, drawn[-1][1], layer + 1)
        else:
            drawn.append((model, layer, layer + 1))
    return DenseRecipe(
        merge_method="passthrough",
        slices=[
            SliceRecipe(sources=[SliceSource(model=model, layer_range=(start, end))]) for model, start, end in drawn
        ],
        dtype=dtype,
    )
