"""The one form of a dense recipe that planning sees: modules of slices of sources, whichever way it was written.

- ``models:`` is one slice over all layers; ``layer_range`` is then None.
- A method that works on task vectors never sees its base among the inputs (its task vector would be zero); neither does
  one whose base is one of the two models merged (slerp). Where the base stands among a slice's sources, it keeps its
  own layers.
- A method without a base ignores ``base_model`` for the arithmetic; it is then only the donor of config and tokenizer
  (`DenseRecipe.donor`), and stays an input where it is also listed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ray.config.recipe import DenseRecipe, InputModel, SliceRecipe, SliceSource, groups
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Level
from mergekit_ray.config.yaml_source import YamlPath
from mergekit_ray.core.declaration import BaseUse, MethodDeclaration
from mergekit_ray.core.registry import METHODS, Registry

LayerRange = tuple[int, int]


@dataclass(frozen=True, slots=True)
class NormalSource:
    """One model's part in a slice.

    Attributes:
        model: which.
        layer_range: its layers, end exclusive; None for all of them.
        levels: the ``parameters`` that apply to it, nearest first, empty ones left out.
        path: where in the recipe it stands, for messages.
    """

    model: ModelReference
    layer_range: LayerRange | None
    levels: tuple[Level, ...]
    path: YamlPath


@dataclass(frozen=True, slots=True)
class NormalSlice:
    """A run of the output's layers.

    Attributes:
        inputs: the models merged, in the recipe's order; the base is not among them.
        base: the base model, if the method works with one.
        base_layer_range: the base's layers: its own if it is listed among the sources, else those that all inputs
            share; None for all layers, or if there is no base.
        levels: the ``parameters`` that apply to the slice as a whole, nearest first. Those of its sources do not.
        path: where in the recipe it stands.
    """

    inputs: tuple[NormalSource, ...]
    base: ModelReference | None
    base_layer_range: LayerRange | None
    levels: tuple[Level, ...]
    path: YamlPath

    @property
    def num_layers(self) -> int | None:
        """Layers of the output that it makes; None for as many as the models have."""
        layers = [s.layer_range for s in self.inputs if s.layer_range is not None]
        bounds = layers[0] if layers else self.base_layer_range
        return None if bounds is None else bounds[1] - bounds[0]


@dataclass(frozen=True, slots=True)
class NormalModule:
    """A part of the model that is merged by itself.

    Attributes:
        name: as in ``modules``; None for a recipe without them.
        slices: in output order.
    """

    name: str | None
    slices: tuple[NormalSlice, ...]


def normalise(recipe: DenseRecipe, methods: Registry[type[MethodDeclaration]] = METHODS) -> tuple[NormalModule, ...]:
    """The normal form of a recipe.

    Args:
        recipe: one that passed `load_recipe` or `check_recipe`.
        methods: where its method is found.

    Raises:
        ConfigError: the method is unknown.
    """
    return normalise_for(recipe, methods.get(recipe.merge_method))


def normalise_for(recipe: DenseRecipe, method: type[MethodDeclaration]) -> tuple[NormalModule, ...]:
    """The normal form of a recipe under a method already looked up."""
    modules: list[NormalModule] = []
    for path, (name, module_level), group in groups(recipe):
        outer = (module_level, recipe.parameters)
        whole = tuple(model for model in group if isinstance(model, InputModel))
        slices = [
            _slice(piece.sources, piece.base_model or recipe.base_model, (piece.parameters, *outer), (*path, i), method)
            for i, piece in enumerate(group)
            if isinstance(piece, SliceRecipe)
        ]
        if whole:
            slices = [_slice(whole, recipe.base_model, outer, path, method)]
        modules.append(NormalModule(name, tuple(slices)))
    return tuple(modules)


def _slice(
    listed: tuple[InputModel | SliceSource, ...],
    base: ModelReference | None,
    outer: tuple[Level, ...],
    path: YamlPath,
    method: type[MethodDeclaration],
) -> NormalSlice:
    outer = tuple(level for level in outer if level)
    sources: list[NormalSource] = []
    for index, source in enumerate(listed):
        levels = (source.parameters, *outer) if source.parameters else outer
        if isinstance(source, SliceSource):
            at: YamlPath = (*path, "sources", index)
            sources.append(NormalSource(source.model, source.layer_range, levels, at))
        else:
            sources.append(NormalSource(source.model, None, levels, (*path, index)))
    if method.base is BaseUse.FORBIDDEN:
        base = None
    inputs = sources
    listed_base = next((source for source in sources if source.model == base), None)
    if listed_base is not None:
        # Slerp may merge a model with other layers of itself; the base's task vector is zero however often listed.
        inputs = [s for s in sources if (s is not listed_base if method.base_is_input else s.model != base)]
    base_layer_range = None
    if base is not None:
        ranges = {source.layer_range for source in inputs}
        shared = next(iter(ranges)) if len(ranges) == 1 else None
        base_layer_range = listed_base.layer_range if listed_base is not None else shared
    return NormalSlice(tuple(inputs), base, base_layer_range, outer, path)
