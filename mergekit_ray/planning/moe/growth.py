"""More experts for a Mixture of Experts: all that it has stays as it is, experts and rows of the routers are added."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mergekit_ray.architectures.anatomy import is_buffer
from mergekit_ray.architectures.moe.family import DenseModel, MoeFamily, MoeNames
from mergekit_ray.architectures.moe.registry import FAMILIES, family_of
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Concat, Expression
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Lowering, Model
from mergekit_ray.planning.moe.checks import check_additions, vocabulary_warnings
from mergekit_ray.planning.moe.experts import ExpertLowering, RouterVectors, Routing, routed

COUNT_KEYS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
"""Under which ``config.json`` gives the number of routed experts, in one family or another."""

ACTIVE_KEY: Final = "num_experts_per_tok"


class Mixture:
    """A model that is a Mixture of Experts already.

    Args:
        model: as the recipe names it.

    Attributes:
        family: that it belongs to.
        names: of its tensors.
        num_experts: routed experts of each layer.
        packed: whether all experts of a layer are in one tensor for each projection.
        sparse_layers: those with experts; others stay as they are.

    Raises:
        ModelError: it is dense, of a family not known here, or its config does not fit its tensors.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        seen = DenseModel(str(model.reference), model.checkpoint.config, model.weights.specs, model.anatomy)
        where = f"base_model {model.reference}"
        family = family_of(seen)
        if family is None:
            raise ModelError(
                f"only a Mixture of Experts takes more experts; its model_type is {seen.model_type or 'not given'}",
                where=where,
                remedy=f"name a model of one of the architectures {', '.join(FAMILIES.names())}, or leave "
                "`add_to_base` out to make one from dense models",
            )
        self.family: MoeFamily = family
        self.names: MoeNames = family.mixture_names(seen)
        self.stack = str(model.anatomy.main)
        rests = [set(layer) for layer in model.anatomy.layers.get(self.stack, ())]
        packed = self.names.packed or {}
        self.packed = any(packed.keys() & found for found in rests)
        router = self.names.packed_router if self.packed else self.names.router
        self.router = router or self.names.router
        self.sparse_layers = [layer for layer, found in enumerate(rests) if self.router in found]
        config = model.checkpoint.config
        self.count_key = next((key for key in COUNT_KEYS if isinstance(config.get(key), int)), None)
        found = {model.weights.specs[self.name(layer, self.router)].shape[0] for layer in self.sparse_layers}
        if self.count_key is None or found != {config[self.count_key]}:
            said = "nothing" if self.count_key is None else config[self.count_key]
            raise ModelError(
                f"config.json gives {said} as the number of experts, and the routers have "
                f"{' or '.join(map(str, sorted(found))) or 'no'} rows",
                where=where,
                remedy="correct its config.json, or download the checkpoint again",
            )
        self.num_experts: int = config[self.count_key]

    def name(self, layer: int, rest: str) -> str:
        """A full tensor name."""
        return f"{self.stack}.{layer}.{rest}"

    def routers(self) -> dict[int, str]:
        """By layer, the name of its router."""
        return {layer: self.name(layer, self.router) for layer in self.sparse_layers}

    def expert_shape(self, layer: int, rest: str) -> tuple[int, ...] | None:
        """Shape of what a dense model calls ``rest`` in one expert; None if there is no such tensor."""
        specs = self.model.weights.specs
        if not self.packed:
            spec = specs.get(self.name(layer, self.names.experts[rest].format(expert=0)))
            return None if spec is None else spec.shape
        name, rests = next((name, rests) for name, rests in (self.names.packed or {}).items() if rest in rests)
        spec = specs.get(self.name(layer, name))
        return None if spec is None else (spec.shape[1] // len(rests), *spec.shape[2:])


def lower_growth(
    recipe: MoeRecipe, models: Mapping[ModelReference, Model], routing: Routing | None = None
) -> tuple[Lowering, dict[str, Any]]:
    """Lower a recipe whose experts are added to those of its base model.

    Args, returns and raises as `mergekit_ray.planning.moe.lower.lower_moe`.
    """
    return _Growth(recipe, models).run(routing)


class _Growth:
    def __init__(self, recipe: MoeRecipe, models: Mapping[ModelReference, Model]) -> None:
        self._recipe = recipe
        self._models = models
        self._base = models[recipe.base_model]
        self._mixture = Mixture(self._base)
        family = self._mixture.family
        if recipe.architecture not in (None, family.name, *family.aliases):
            raise PlanError(
                f"the base model is a {family.name}, and stays one",
                where=f"architecture {recipe.architecture}",
                remedy="leave `architecture` out",
            )
        first = self._mixture.routers()[self._mixture.sparse_layers[0]]
        self._hidden = self._base.weights.specs[first].shape[1]
        self._experts = ExpertLowering(recipe, self._base, self._hidden)
        self._result = Lowering()
        self._used: set[tuple[str, str]] = set()

    def run(self, routing: Routing | None) -> tuple[Lowering, dict[str, Any]]:
        config = self._config()
        sources = [self._models[source] for source in dict.fromkeys(e.source_model for e in self._recipe.experts)]
        mixture, anatomy = self._mixture, self._base.anatomy
        check_additions(mixture.family, self._base, sources, self._shapes())
        self._result.warnings += vocabulary_warnings(self._base, sources)
        routers = self._route(routing)
        self._result.tied = anatomy.tied if anatomy.embedding is not None else None
        for name in anatomy.redundant:
            self._result.aliased[name] = str(anatomy.embedding)
        self._add({name: self._copy(name) for name in self._kept(anatomy.before)})
        for layer in range(anatomy.num_layers):
            rests = anatomy.layers[mixture.stack][layer]
            made = {name: self._copy(name) for name in self._kept(mixture.name(layer, rest) for rest in rests)}
            if layer in mixture.sparse_layers:
                made |= self._grown(layer, made, routers)
            self._add(made)
        self._add({name: self._copy(name) for name in self._kept(anatomy.after)})
        self._name_unused()
        return self._result, config

    def _config(self) -> dict[str, Any]:
        """The base's, with more experts.

        Raises:
            PlanError: a token is to use more experts than there are.
        """
        config = copy.deepcopy(dict(self._base.checkpoint.config))
        total = self._mixture.num_experts + len(self._recipe.experts)
        for key in COUNT_KEYS:
            if config.get(key) == self._mixture.num_experts:
                config[key] = total
        if self._recipe.experts_per_token is not None:
            config[ACTIVE_KEY] = self._recipe.experts_per_token
        active = config.get(ACTIVE_KEY, 0)
        if not isinstance(active, int):
            raise ModelError(
                f"config.json gives {ACTIVE_KEY} as {active!r:.200}",
                where=f"base_model {self._base.reference}",
                remedy="correct its config.json, or say experts_per_token",
            )
        if active > total:
            raise PlanError(
                f"a token cannot use {active} experts of {total}",
                where="experts_per_token",
                remedy=f"accepted: 1 to {total}",
            )
        return config

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What each feed-forward tensor of a dense model must look like, by its full name."""
        mixture = self._mixture
        found = {}
        for layer in mixture.sparse_layers:
            for rest in mixture.names.experts:
                shape = mixture.expert_shape(layer, rest)
                if shape is not None:
                    found[mixture.name(layer, rest)] = shape
        return found

    def _route(self, routing: Routing | None) -> RouterVectors | None:
        return routed(
            routing,
            self._result,
            f"gate_mode {self._recipe.gate_mode.value}: the new rows of the routers are as long as those that are "
            "there, which are read when the merge is run; in this plan they are not yet what they will be",
        )

    def _kept(self, names: Any) -> Iterator[str]:
        """Of the base's tensors those that are weights of the model."""
        return (name for name in names if not is_buffer(name) and name not in self._base.anatomy.redundant)

    def _copy(self, name: str) -> Expression:
        self._used.add((self._base.key, name))
        return self._experts.copy(self._base, name)

    def _add(self, expressions: Mapping[str, Expression]) -> None:
        self._result.expressions |= expressions
        group = [TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions.items()]
        if group:
            self._result.groups.append(group)

    def _grown(
        self, layer: int, kept: Mapping[str, Expression], routers: RouterVectors | None
    ) -> dict[str, Expression]:
        """Router and experts of a layer, those that stay first."""
        mixture, new = self._mixture, self._recipe.experts
        name = mixture.name(layer, mixture.router)
        old = kept[name]
        spec = TensorSpec(name, old.spec.dtype, (len(new), self._hidden))
        vectors = routers.vectors.get(layer) if routers is not None else None
        length = routers.lengths.get(layer) if routers is not None else None
        # Numbered, so that rows added another time with the same seed are others.
        key = f"{self._recipe.seed}\nrouter from {mixture.num_experts}\n{layer}"
        rows = self._experts.router(spec, key, vectors, length)
        grown: dict[str, Expression] = {name: _appended(old, [rows])}
        numbers = range(mixture.num_experts, mixture.num_experts + len(new))
        if not mixture.packed:
            for rest, pattern in mixture.names.experts.items():
                for number in numbers:
                    target = mixture.name(layer, pattern.format(expert=number))
                    like = kept[mixture.name(layer, pattern.format(expert=0))]
                    grown[target] = self._expert(layer, rest, number, like)
            return grown
        for packed, rests in (mixture.names.packed or {}).items():
            name = mixture.name(layer, packed)
            parts = [self._expert(layer, rest, number, kept[name]) for number in numbers for rest in rests]
            grown[name] = _appended(kept[name], parts, len(new))
        return grown

    def _expert(self, layer: int, rest: str, number: int, like: Expression) -> Expression:
        """A tensor of a new expert, in the dtype of the existing ones."""
        names, expert = self._mixture.names, self._recipe.experts[number - self._mixture.num_experts]
        model, name = self._models[expert.source_model], self._mixture.name(layer, rest)
        self._used.add((model.key, name))
        target = self._mixture.name(layer, names.experts[rest].format(expert=number))
        return self._experts.expert(target, like.spec.dtype, (model, name), expert, is_residual=rest in names.residual)

    def _name_unused(self) -> None:
        """Every input tensor is used, aliased, or named as dropped."""
        for model in self._models.values():
            for name in model.weights.specs:
                if (model.key, name) in self._used or (model is self._base and name in self._result.aliased):
                    continue
                reason = f"not a feed-forward layer, and {self._base.reference} gives all else"
                if is_buffer(name):
                    reason = "a constant that the model computes itself"
                self._result.dropped.setdefault(f"{model.reference}: {name}", reason)


def _appended(old: Expression, parts: list[Expression], num_rows: int | None = None) -> Expression:
    """A tensor with more along its first dimension."""
    spec = old.spec
    more = sum(part.spec.shape[0] for part in parts) if num_rows is None else num_rows
    return Concat((old, *parts), TensorSpec(spec.name, spec.dtype, (spec.shape[0] + more, *spec.shape[1:])))
