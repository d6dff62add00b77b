"""Recipes by whatever name a user gives them: a path, a text, a mapping, or a file in a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from mergekit_ray.config.load import Recipe
from mergekit_ray.config.load import load_recipe as load_here
from mergekit_ray.config.stages import Stage, StagedRecipe
from mergekit_ray.config.yaml_source import MAX_TEXT_BYTES
from mergekit_ray.core.errors import CheckpointError, ConfigError, Problem
from mergekit_ray.storage.opening import open_source

_URI: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<place>\S+)")
_HUB_PARTS: Final = 2  # org/name


def is_uri(text: str) -> bool:
    """Whether a text names a file in a store, such as ``s3://bucket/recipes/merge.yml``."""
    return _URI.fullmatch(text) is not None


def load_recipe(
    source: Path | str | Mapping[str, Any] | Recipe,
    *,
    lenient: bool = False,
    on_warning: Callable[[Problem], None] | None = None,
) -> Recipe:
    """Read a recipe, dense or Mixture of Experts.

    Args:
        source: a path; a string, which is a path if it ends in ``.yml`` or ``.yaml`` or names a file, a file in a store
            if it is a URI (``s3://bucket/recipes/merge.yml``, ``hf://org/name/merge.yml``), and YAML text if it has a
            line break or ``": "``; a mapping such as ``yaml.safe_load`` gives; or a recipe built in Python, which is
            checked against its merge method.
        lenient: turn unknown keys and parameters into warnings: mergekit ignored them.
        on_warning: called with each thing that has no effect; `warnings.warn` with a `RecipeWarning` if None.

    Returns:
        The recipe, sound as far as can be told without looking at a model.

    Raises:
        ConfigError: with all that is wrong as `ConfigError.problems`, in file order; or there is no such recipe.
        StorageError: the store that should have it failed.
    """
    if isinstance(source, str) and is_uri(source):
        recipe = load_here(_fetch(source), name=source, lenient=lenient, on_warning=on_warning)
    else:
        recipe = load_here(source, lenient=lenient, on_warning=on_warning)
    check_stage_names(recipe)
    return recipe


def check_stage_names(recipe: Recipe) -> None:
    """Check that no stage is called as a folder is.

    Raises:
        ConfigError: naming it.
    """
    for name in recipe.named if isinstance(recipe, StagedRecipe) else ():
        if Path(name).expanduser().is_dir():
            raise ConfigError(
                f"the stage {name!r} has the name of a folder",
                remedy=f"give the stage another name; a folder is named with its path: ./{name}",
            )


def with_shard_size(recipe: Recipe, max_shard_size: int) -> Recipe:
    """The recipe with another limit to the size of its output's files, in bytes; of stages, that of all."""
    if isinstance(recipe, StagedRecipe):
        sized = tuple(_sized(stage, max_shard_size) for stage in recipe.stages)
        return recipe.model_copy(update={"stages": sized})
    return _sized(recipe, max_shard_size)


def _sized(recipe: Stage, max_shard_size: int) -> Stage:
    output = recipe.output.model_copy(update={"max_shard_size": max_shard_size})
    return recipe.model_copy(update={"output": output})


def _fetch(uri: str) -> bytes:
    scheme, _, place = uri.partition("://")
    parts = place.split("/")
    num_outer = _HUB_PARTS if scheme.lower() == "hf" else len(parts) - 1
    name = "/".join(parts[num_outer:])
    if not name or num_outer < 1:
        raise ConfigError(
            "this names no file", where=uri, remedy="name the recipe's file, such as s3://bucket/recipes/merge.yml"
        )
    store = open_source(f"{scheme}://{'/'.join(parts[:num_outer])}")
    try:
        return store.read(name, max_bytes=MAX_TEXT_BYTES)
    except CheckpointError as error:
        raise ConfigError(f"the recipe cannot be read: {error.what}", where=uri, remedy="check its address") from error
    finally:
        close = getattr(store, "close", None)
        if close is not None:
            close()
