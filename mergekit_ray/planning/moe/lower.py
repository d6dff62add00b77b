"""A Mixture-of-Experts recipe -> expressions: experts from feed-forward layers, all else from one model or a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_ray.architectures.anatomy import is_buffer, place_of
from mergekit_ray.architectures.moe.family import DenseModel, MoeFamily, Wanted
from mergekit_ray.architectures.moe.registry import choose, family_of
from mergekit_ray.config.moe_recipe import ExpertRecipe, MoeRecipe
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Concat, Constant, Expression
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.dense import lower, rules_of
from mergekit_ray.planning.lowering import Arithmetic, Lowering, Model
from mergekit_ray.planning.moe.checks import check_backbone, check_sources, vocabulary_warnings
from mergekit_ray.planning.moe.experts import COMPUTE_DTYPES, ExpertLowering, RouterVectors, Routing, routed
from mergekit_ray.planning.moe.growth import lower_growth

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def lower_moe(
    recipe: MoeRecipe, models: Mapping[ModelReference, Model], routing: Routing | None = None
) -> tuple[Lowering, dict[str, Any]]:
    """Lower a recipe.

    Args:
        recipe: validated.
        models: every model the recipe names.
        routing: makes the routers of a gate mode that needs prompts. Without it those are left at zero, and a warning
            says so: enough to see what would be written, not to write it.

    Returns:
        The output tensors, and its config but for dtype, vocabulary and tying.

    Raises:
        ConfigError: no such architecture.
        ModelError: models that do not fit together or into the architecture; all mismatches are listed. A base model
            that is a Mixture of Experts, unless the recipe adds to it, and one that is none if it does.
        PlanError: a shared expert without prompts, or a backbone that is not one.
    """
    return lower_growth(recipe, models, routing) if recipe.add_to_base else _MoeLowering(recipe, models).run(routing)


class _MoeLowering:
    def __init__(self, recipe: MoeRecipe, models: Mapping[ModelReference, Model]) -> None:
        self._recipe = recipe
        self._models = models
        self._base = models[recipe.base_model]
        base = self._base
        self._dense = DenseModel(str(base.reference), base.checkpoint.config, base.weights.specs, base.anatomy)
        self._wanted = Wanted(
            num_experts=len(recipe.experts),
            experts_per_token=recipe.num_active,
            has_shared=bool(recipe.shared_experts),
            packed=recipe.expert_layout == "packed",
        )
        if family_of(self._dense) is not None:
            raise ModelError(
                f"it already is a Mixture of Experts ({self._dense.model_type}); experts are made from dense models",
                where=f"base_model {base.reference}",
                remedy="name a dense model, or set `add_to_base: true` to add the experts to those it has",
            )
        self._family: MoeFamily = choose(self._dense, self._wanted, recipe.architecture)
        self._names = self._family.names(self._dense)
        assert base.anatomy.main is not None  # no family takes a model without layers
        self._stack = base.anatomy.main
        self._experts = ExpertLowering(recipe, base, self._hidden)
        self._result = Lowering(warnings=list(self._family.caveats(self._wanted)))
        self._used: set[tuple[str, str]] = set()

    def run(self, routing: Routing | None) -> tuple[Lowering, dict[str, Any]]:
        experts = [*self._recipe.experts, *(self._recipe.shared_experts or ())]
        sources = list(dict.fromkeys(expert.source_model for expert in experts))
        frame_names = () if self._recipe.backbone is not None else self._frame_names()
        check_sources(self._base, [self._models[source] for source in sources], self._names.experts, frame_names)
        self._result.warnings += vocabulary_warnings(self._base, [self._models[source] for source in sources])
        self._check_shared_prompts()
        frame = self._copied() if self._recipe.backbone is None else self._merged(self._recipe.backbone)
        routers = self._route(routing)
        config = self._family.config(self._dense, self._wanted)
        self._add_group(frame, [name for name in self._base.anatomy.before if name in frame])
        for layer in range(self._base.anatomy.num_layers):
            prefix = f"{self._stack}.{layer}."
            made = {name: x for name, x in frame.items() if name.startswith(prefix)}
            made |= self._blank_biases(layer, made)
            made |= {prefix + rest: x for rest, x in self._feed_forward(layer, routers)}
            self._add_group(made, list(made))
        after = [name for name in frame if place_of(name) is None and name not in self._base.anatomy.before]
        self._add_group(frame, after)
        self._name_unused()
        self._result.files |= self._family.files(self._dense)
        return self._result, config

    def _add_group(self, expressions: Mapping[str, Expression], names: Sequence[str]) -> None:
        group = []
        for name in names:
            x = expressions[name]
            self._result.expressions[name] = x
            group.append(TensorSpec(name, x.spec.dtype, x.spec.shape))
        if group:
            self._result.groups.append(group)

    # -- what is outside the feed-forward layers --------------------------------------------------------------------

    def _copied(self) -> dict[str, Expression]:
        """From the base model, as it is."""
        anatomy = self._base.anatomy
        self._result.tied = anatomy.tied if anatomy.embedding is not None else None
        for name in anatomy.redundant:
            self._result.aliased[name] = str(anatomy.embedding)
        frame = {}
        for name in self._frame_names():
            self._used.add((self._base.key, name))
            frame[name] = self._experts.copy(self._base, name)
        return frame

    def _merged(self, backbone: DenseRecipe) -> dict[str, Expression]:
        """From a dense recipe: what it makes of everything but the feed-forward layers."""
        stored = self._recipe.dtype or backbone.out_dtype or backbone.dtype
        arithmetic = Arithmetic(stored, backbone.dtype, COMPUTE_DTYPES[backbone.compute_dtype], self._backbone_seed)
        method = METHODS.get(backbone.merge_method)
        donor, rules = self._models[backbone.donor], rules_of(backbone)
        lowering = lower(normalise(backbone), method, self._models, donor, arithmetic, rules)
        specs = {spec.name: spec for group in lowering.groups for spec in group if not self._is_feed_forward(spec.name)}
        specs = {name: spec for name, spec in specs.items() if not is_buffer(name)}
        check_backbone(self._base, self._frame_names(), specs)
        self._result.tied, self._result.vocab_size = lowering.tied, lowering.vocab_size
        self._result.dropped |= lowering.dropped
        self._result.aliased |= lowering.aliased
        self._result.warnings += [f"backbone: {warning}" for warning in lowering.warnings]
        for reference in backbone.model_references():
            model = self._models[reference]
            self._used |= {
                (model.key, name)
                for name in model.weights.specs
                if not self._is_feed_forward(name) and not is_buffer(name)
            }
        return {name: lowering.expressions[name] for name in specs}

    @property
    def _backbone_seed(self) -> int:
        backbone = self._recipe.backbone
        return backbone.seed if backbone is not None and backbone.seed else self._recipe.seed

    def _frame_names(self) -> list[str]:
        """The base's tensors outside its feed-forward layers, in model order; constants and copies left out."""
        anatomy = self._base.anatomy
        layers = [
            f"{self._stack}.{layer}.{rest}"
            for layer, rests in enumerate(anatomy.layers.get(self._stack, ()))
            for rest in rests
            if rest not in self._names.experts
        ]
        names = [*anatomy.before, *layers, *anatomy.after]
        return [name for name in names if not is_buffer(name) and name not in anatomy.redundant]

    def _is_feed_forward(self, name: str) -> bool:
        place = place_of(name)
        return place is not None and place.stack == self._stack and place.rest in self._names.experts

    def _blank_biases(self, layer: int, made: Mapping[str, Expression]) -> dict[str, Expression]:
        """Zeros for the biases that the family has and the base has not."""
        blank: dict[str, Expression] = {}
        for rest, weight in self._family.zero_biases.items():
            name = f"{self._stack}.{layer}.{rest}"
            if name not in made:
                of = made[f"{self._stack}.{layer}.{weight}"].spec
                blank[name] = Constant(TensorSpec(name, of.dtype, of.shape[:1]), 0.0)
        return blank

    # -- experts ----------------------------------------------------------------------------------------------------

    def _feed_forward(self, layer: int, routers: RouterVectors | None) -> Iterator[tuple[str, Expression]]:
        """Names below the layer with what makes them: router, shared expert, experts."""
        names, recipe = self._names, self._recipe
        packed = names.packed if self._wanted.packed else None
        router = names.packed_router if packed is not None and names.packed_router is not None else names.router
        vectors = None if routers is None else routers.vectors[layer]
        yield router, self._router(layer, router, "router", len(recipe.experts), vectors)
        if recipe.shared_experts:
            yield from self._shared(layer, recipe.shared_experts[0], routers)
        elif self._family.blank_shared_rows(self._dense):
            yield from self._blank_shared(layer)
        if packed is None:
            # One projection of all experts after another: what experts of one model share is read at one time.
            for rest, pattern in names.experts.items():
                for number, expert in enumerate(recipe.experts):
                    yield pattern.format(expert=number), self._expert(layer, rest, pattern, expert, number)
            return
        for name, rests in packed.items():
            yield name, self._packed(layer, name, rests)

    def _packed(self, layer: int, name: str, rests: Sequence[str]) -> Expression:
        """All experts of a layer in one tensor."""
        experts = enumerate(self._recipe.experts)
        patterns = self._names.experts
        parts = [self._expert(layer, rest, patterns[rest], e, number) for number, e in experts for rest in rests]
        num_rows = sum(part.spec.shape[0] for part in parts[: len(rests)])
        shape = (len(self._recipe.experts), num_rows, *parts[0].spec.shape[1:])
        return Concat(tuple(parts), TensorSpec(f"{self._stack}.{layer}.{name}", parts[0].spec.dtype, shape))

    def _shared(
        self, layer: int, expert: ExpertRecipe, routers: RouterVectors | None
    ) -> Iterator[tuple[str, Expression]]:
        names = self._names
        if names.shared_gate is not None:
            vectors = None if routers is None else routers.shared[layer]
            yield names.shared_gate, self._router(layer, names.shared_gate, "shared router", 1, vectors)
        for rest, pattern in (names.shared or {}).items():
            yield pattern, self._expert(layer, rest, pattern, expert, 0)

    def _blank_shared(self, layer: int) -> Iterator[tuple[str, Expression]]:
        """A shared expert that adds nothing: every tensor zero."""
        names, num_rows = self._names, self._family.blank_shared_rows(self._dense)
        for rest, pattern in (names.shared or {}).items():
            rows, columns = self._dense.shape(rest)
            shape = (rows, num_rows) if rest in names.residual else (num_rows, columns)
            yield pattern, self._zeros(layer, pattern, shape)
        if names.shared_gate is not None:
            yield names.shared_gate, self._zeros(layer, names.shared_gate, (1, self._hidden))

    def _expert(self, layer: int, rest: str, pattern: str, expert: ExpertRecipe, number: int) -> Expression:
        """A feed-forward tensor of an expert's model: its bytes if nothing is asked for but a copy."""
        model = self._models[expert.source_model]
        name = f"{self._stack}.{layer}.{rest}"
        self._used.add((model.key, name))
        target = f"{self._stack}.{layer}.{pattern.format(expert=number)}"
        stored = self._experts.stored(self._base, name)
        return self._experts.expert(target, stored, (model, name), expert, is_residual=rest in self._names.residual)

    # -- routers ----------------------------------------------------------------------------------------------------

    def _route(self, routing: Routing | None) -> RouterVectors | None:
        if not self._recipe.gate_mode.needs_prompts:
            return None
        return routed(
            routing,
            self._result,
            f"gate_mode {self._recipe.gate_mode.value}: the routers are made from the prompts when the merge is run; "
            "in this plan they are zero",
        )

    def _router(
        self, layer: int, rest: str, stream: str, num_rows: int, vectors: NDArray[np.float32] | None
    ) -> Expression:
        spec = TensorSpec(f"{self._stack}.{layer}.{rest}", self._router_dtype, (num_rows, self._hidden))
        return self._experts.router(spec, f"{self._recipe.seed}\n{stream}\n{layer}", vectors)

    def _check_shared_prompts(self) -> None:
        recipe = self._recipe
        if not (recipe.shared_experts and recipe.gate_mode.needs_prompts and self._names.shared_gate is not None):
            return
        if not recipe.shared_experts[0].positive_prompts:
            raise PlanError(
                f"the shared expert of a {self._family.name} has a gate of its own, which gate_mode "
                f"{recipe.gate_mode.value!r} makes from prompts, and it has no `positive_prompts`",
                where="shared_experts[0]",
                remedy="list positive_prompts, or choose `gate_mode: random`",
            )

    # -- dtypes, shapes, what is left -------------------------------------------------------------------------------

    @property
    def _hidden(self) -> int:
        embedding = self._base.anatomy.embedding
        assert embedding is not None  # every family's names have one
        return self._base.weights.specs[embedding].shape[1]

    @property
    def _router_dtype(self) -> DType:
        return self._experts.stored(self._base, f"{self._stack}.0.{next(iter(self._names.experts))}")

    def _zeros(self, layer: int, rest: str, shape: tuple[int, ...]) -> Expression:
        return Constant(TensorSpec(f"{self._stack}.{layer}.{rest}", self._router_dtype, shape), 0.0)

    def _name_unused(self) -> None:
        """Every input tensor is used, aliased, or named as dropped."""
        giver = "the backbone" if self._recipe.backbone is not None else str(self._base.reference)
        for model in self._models.values():
            for name in model.weights.specs:
                if (model.key, name) in self._used or (model is self._base and name in self._result.aliased):
                    continue
                if is_buffer(name):
                    reason = "a constant that the model computes itself"
                elif self._is_feed_forward(name):
                    reason = "a feed-forward layer that no expert is made of"
                elif name in model.anatomy.redundant:
                    reason = "a stored copy of the embedding"
                else:
                    reason = f"outside the feed-forward layers, which {giver} gives"
                self._result.dropped.setdefault(f"{model.reference}: {name}", reason)
