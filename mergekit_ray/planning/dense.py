"""A dense recipe -> expressions: which input tensors make each output tensor, and how.

Works on the normal form of a recipe (modules of slices of sources) and the headers of the models, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_ray.architectures.anatomy import is_buffer
from mergekit_ray.architectures.heads import lacks_head, may_have_head, unstored_head
from mergekit_ray.architectures.ties import ties_more
from mergekit_ray.config.normal import NormalModule
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import gradient_position
from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.cuts import cut_of
from mergekit_ray.planning.lowering import Arithmetic, Cut, Lowering, Model, Operand, Rules
from mergekit_ray.planning.matching.modules import below, main_stack, module_prefix
from mergekit_ray.planning.matching.partial import PREDICTION, beyond_part, is_beyond
from mergekit_ray.planning.matching.renaming import notes, renamed
from mergekit_ray.planning.tensors import TensorLowering
from mergekit_ray.planning.vocabulary import Vocabulary, common_vocabulary

_NO_RULES = Rules()


def rules_of(recipe: DenseRecipe) -> Rules:
    """What a recipe says of tensors that are not merged."""
    return Rules(recipe.of_missing, recipe.include, recipe.exclude or (), recipe.from_model)


def lower(
    modules: Sequence[NormalModule],
    method: type[MethodDeclaration],
    models: Mapping[ModelReference, Model],
    donor: Model,
    arithmetic: Arithmetic,
    rules: Rules = _NO_RULES,
) -> Lowering:
    """Lower a recipe.

    Args:
        modules: the normal form of the recipe.
        method: the recipe's merge method.
        models: every model the recipe names.
        donor: whose config the output gets.
        arithmetic: dtypes and seed.
        rules: which tensors are not merged, and where they come from.

    Raises:
        ModelError: models that do not fit together; all mismatches are listed.
        PlanError: layer ranges beyond a model, modules that match nothing, parameters with which nothing can be merged.
    """
    slices = [part for module in modules for part in module.slices]
    named = {source.model for part in slices for source in part.inputs} | {
        rules.source,
        *(part.base for part in slices),
    }
    seen = {reference: renamed(model, donor, rules) for reference, model in models.items() if reference in named}
    its = {donor.reference: donor} | seen
    first = _DenseLowering(method, its, donor, arithmetic, rules)
    lowering = first.run(modules)
    common = common_vocabulary(first.vocabulary, donor)
    if common is not None:  # which tensors the vocabulary has is known once all are there
        lowering = _DenseLowering(method, its, donor, arithmetic, rules, common).run(modules)
    lowering.warnings[:0] = [note for reference, model in seen.items() for note in notes(models[reference], model)]
    return lowering


class _DenseLowering:
    def __init__(
        self,
        method: type[MethodDeclaration],
        models: Mapping[ModelReference, Model],
        donor: Model,
        arithmetic: Arithmetic,
        rules: Rules,
        common: Vocabulary | None = None,
    ) -> None:
        self._common = common
        self._method = method
        self._donor = donor
        self._models = models
        self._result = Lowering()
        self._tensors = TensorLowering(method, arithmetic, rules, self._models, donor, self._result, common)
        self._prefixes: list[str | None] = []
        self._stacks: set[str | None] = set()  # that modules have made, with as many layers as they say
        self._heads = {head for model in models.values() for head in _heads_of(model)}

    @property
    def vocabulary(self) -> Mapping[str, set[int]]:
        """Numbers of rows that models have, of each tensor with a row for each token."""
        return self._tensors.vocabulary

    def run(self, modules: Sequence[NormalModule]) -> Lowering:
        named = [module for module in modules if module.name is not None]
        self._prefixes = [
            None if module.name is None else module_prefix(module.name, self._donor) for module in modules
        ]
        for module, prefix in zip(modules, self._prefixes, strict=True):
            self._tensors.module = module.name
            stack = main_stack(self._donor, prefix)
            is_only = len(module.slices) == 1
            cuts = [
                cut_of(part, self._models, self._method, self._donor, stack, is_only=is_only) for part in module.slices
            ]
            self._module(cuts, prefix, stack)
        self._tensors.mismatches.raise_if_any()
        if named:
            self._check_all_covered()
        self._tensors.settle()
        self._name_unused()
        if self._common is not None:
            self._result.vocab_size = self._common.rows
            self._result.warnings += self._common.warnings(self._tensors.vocabulary)
        return self._result

    # -- modules --------------------------------------------------------------------------------------------------

    def _module(self, cuts: list[Cut], prefix: str | None, stack: str | None) -> None:
        first, last = cuts[0], cuts[-1]
        is_whole = self._is_whole(cuts, stack)
        self._outside(first, self._names(first, "before", prefix, is_whole=is_whole))
        layers: list[tuple[Model, int]] = []
        for cut in cuts:
            if stack is None:
                continue
            num_layers = cut.donor.anatomy.stacks.get(stack, 0) if cut.is_all else cut.num_layers
            for i in range(num_layers):
                donor_first = cut.base_first_layer if cut.base is not None else cut.first_layers[0]
                self._layer(cut, stack, i, num_layers, len(layers), is_donors=is_whole)
                layers.append((cut.donor, donor_first + i))
        for other, count in _deepest(self._participants(first)).items():
            if other != stack and (prefix is None or below(other, prefix)):
                if not is_whole and PREDICTION.search(other):
                    everyone = self._participants(first)
                    self._leave_out_beyond(first, [n for m in everyone for n in m.weights.specs if below(n, other)])
                    continue
                whole = self._uncut(first)
                for i in range(count):
                    self._layer(whole, other, i, count, i, is_donors=True)
        after = self._names(last, "after", prefix, is_whole=is_whole)
        self._outside(last, self._with_head(first, last, after, prefix))
        self._stacks.add(stack)
        if stack is not None and not is_whole:
            if stack == self._donor.anatomy.main:
                self._result.layers = layers
            else:
                self._result.towers[stack] = layers

    def _is_whole(self, cuts: Sequence[Cut], stack: str | None) -> bool:
        """Whether a stack is the donor's, layer by layer."""
        if len(cuts) == 1 and cuts[0].is_all:
            return True
        firsts = [(cut, cut.base_first_layer if cut.base is not None else cut.first_layers[0]) for cut in cuts]
        layers = [(cut.donor.key, first + i) for cut, first in firsts for i in range(cut.num_layers)]
        return layers == [(self._donor.key, i) for i in range(self._donor.anatomy.stacks.get(stack or "", 0))]

    def _leave_out_beyond(self, cut: Cut, names: Sequence[str]) -> None:
        """Layers beyond the stack proper, and modules that predict more tokens, fit no stack that is cut anew."""
        for name in dict.fromkeys(names):
            operands = (Operand(model, name) for model in self._participants(cut))
            having = [operand for operand in operands if operand.exists]
            for operand in having:
                self._tensors.used.add((operand.model.key, name))
            where = "in " + ", ".join(dict.fromkeys(str(operand.model.reference) for operand in having))
            reason = "left out, as the layers are cut anew"
            self._tensors.partial.leave_out(name, having, beyond_part(name), where, reason)

    def _participants(self, cut: Cut) -> list[Model]:
        """Who decides which tensors the output has: a slice's models, and the donor, whose config describes them."""
        return [*cut.models, *([] if self._donor in cut.models else [self._donor])]

    @staticmethod
    def _uncut(cut: Cut) -> Cut:
        """The same models over all their layers: for stacks that slices do not speak of."""
        return replace(
            cut, first_layers=tuple(0 for _ in cut.first_layers), base_first_layer=0, num_layers=0, is_all=True
        )

    def _names(self, cut: Cut, side: str, prefix: str | None, *, is_whole: bool) -> list[str]:
        names: dict[str, None] = {}
        beyond: list[str] = []
        for model in self._participants(cut):
            for name in getattr(model.anatomy, side):
                if name in model.anatomy.redundant or not (prefix is None or below(name, prefix)):
                    continue
                if not is_whole and is_beyond(model, name):
                    beyond.append(name)
                else:
                    names[name] = None
        self._leave_out_beyond(cut, beyond)
        return sorted(names)

    def _check_all_covered(self) -> None:
        missing = [
            name
            for name in self._donor.weights.specs
            if name not in self._result.expressions
            and name not in self._donor.anatomy.redundant
            and not is_buffer(name)
            and self._donor.label(name) not in self._result.dropped
            and not any(stack is not None and below(name, stack) for stack in self._stacks)
        ]
        if missing:
            raise PlanError(
                f"no module covers {counted(len(missing), 'tensor')}, the first is {missing[0]!r}",
                remedy="add modules for them, or use 'default' for the whole model",
            )

    # -- tensors --------------------------------------------------------------------------------------------------

    def _layer(self, cut: Cut, stack: str, i: int, num_layers: int, out_layer: int, *, is_donors: bool) -> None:
        """Add one layer. With ``is_donors`` it takes the place of a donor's layer, which must have the same tensors."""
        t = gradient_position(i, num_layers)
        places = [first + i for first in cut.first_layers]
        base_place = cut.base_first_layer + i
        rests: dict[str, None] = {}
        everyone = [*zip(cut.sources, places, strict=True), *([(cut.base, base_place)] if cut.base else [])]
        if is_donors:
            everyone.append((self._donor, out_layer))
        for model, layer in everyone:
            layers = model.anatomy.layers.get(stack, ())
            rests |= dict.fromkeys(layers[layer] if layer < len(layers) else ())
        group = []
        for rest in sorted(rests):
            operands = [Operand(m, f"{stack}.{layer}.{rest}") for m, layer in zip(cut.sources, places, strict=True)]
            base = None if cut.base is None else Operand(cut.base, f"{stack}.{base_place}.{rest}")
            name = f"{stack}.{out_layer}.{rest}"
            donors = Operand(self._donor, name) if is_donors and self._donor not in cut.models else None
            group += self._tensors.add(name, operands, base, cut, t, donors)
        self._add_group(group)

    def _outside(self, cut: Cut, names: list[str]) -> None:
        group = []
        for name in names:
            operands = [self._outside_operand(model, name) for model in cut.sources]
            base = None if cut.base is None else self._outside_operand(cut.base, name)
            donors = None if self._donor in cut.models else self._outside_operand(self._donor, name)
            group += self._tensors.add(name, operands, base, cut, 0.0, donors)
        self._add_group(group)

    def _with_head(self, first: Cut, last: Cut, names: list[str], prefix: str | None) -> list[str]:
        """Decide whether the output is tied, and add the head to ``names`` if it must be made of an embedding.

        It is decided once, by the module that makes the embedding.
        """
        embedding = last.donor.anatomy.embedding
        heads = self._head_names(first, last)
        is_elsewhere = embedding is None or not (prefix is None or below(embedding, prefix))
        if embedding is None or is_elsewhere or lacks_head(self._donor.checkpoint.config):
            return names
        if not heads:
            self._keep_unnamed_tie(first, last)
            return names
        self._result.tied = self._is_tied(first, last)
        if self._result.tied:
            for model in {m.key: m for m in (*first.models, *last.models)}.values():
                for name in model.anatomy.redundant:
                    self._result.aliased[name] = embedding
                    self._tensors.used.add((model.key, name))
            return [name for name in names if name not in heads]  # an untied donor's, which is not merged
        self._check_can_be_untied([*first.models, *last.models, self._donor])
        copies = {name for model in self._participants(last) for name in model.anatomy.copies}
        wanted = [
            name
            for name in (heads[0], *copies - self._result.expressions.keys())
            if any(self._outside_operand(model, name).exists for model in self._participants(last))
            and not any(p is not None and p != prefix and below(name, p) for p in self._prefixes)
        ]
        return sorted({*names, *wanted})

    @staticmethod
    def _check_can_be_untied(models: Sequence[Model]) -> None:
        tied = next((m for m in models if m.anatomy.tied and ties_more(m.checkpoint.config)), None)
        if tied is not None:
            raise PlanError(
                "the output's head would not be its embedding, and the class ties other tensors to each other as well: "
                "transformers unties all or nothing",
                where=f"model {tied.reference}",
                remedy="take the layers before the first and after the last slice from the same model, and merge tied "
                "models only with tied ones",
            )

    @staticmethod
    def _head_names(first: Cut, last: Cut) -> list[str]:
        """Name of the output projection, if any model stores one or is tied and of a class that tells the name."""
        models = (*last.models, *first.models)
        named = [name for m in models for name in _heads_of(m)]
        return [name for name in named if any(name in m.weights.specs for m in models)] or named

    def _keep_unnamed_tie(self, first: Cut, last: Cut) -> None:
        """Say which head is lost where the models are tied and nothing tells under which name to store another."""
        has_head = any(m.anatomy.tied and may_have_head(m.checkpoint.config) for m in last.models)
        if has_head and (first.sources != last.sources or first.base != last.base):
            lost = ", ".join(str(m.reference) for m in last.models)
            self._result.warnings.append(
                f"the output's head stays tied to its embedding, made from "
                f"{', '.join(str(m.reference) for m in first.models)}; the head of {lost} is lost, because nothing "
                "tells what the class calls a separate head"
            )

    def _is_tied(self, first: Cut, last: Cut) -> bool:
        """The output is tied if every input is and head and embedding are made from the same models."""
        having = [m for m in (*first.models, *last.models) if not lacks_head(m.checkpoint.config)]
        if not having or not all(model.anatomy.tied for model in having):
            return False
        if all(lacks_head(model.checkpoint.config) for model in last.models):
            return self._donor.anatomy.tied and first.models == (self._donor,)  # the head is the donor's
        return first.sources == last.sources and first.base == last.base

    def _outside_operand(self, model: Model, name: str) -> Operand:
        """A tied model's head is its embedding."""
        anatomy = model.anatomy
        is_head = name in self._heads and (name == anatomy.head or name not in model.weights.specs)
        is_tied = anatomy.tied and not lacks_head(model.checkpoint.config)
        if anatomy.embedding is not None and is_tied and (is_head or name in anatomy.redundant):
            return Operand(model, anatomy.embedding)
        return Operand(model, anatomy.copies.get(name, name))

    def _add_group(self, group: list[TensorSpec]) -> None:
        if group:
            self._result.groups.append(group)

    def _name_unused(self) -> None:
        """Every input tensor is used, aliased, or named as dropped."""
        read = {model_key for model_key, _ in self._tensors.used}
        for model in self._models.values():
            if model.key not in read:
                continue
            for name in model.weights.specs:
                if (model.key, name) not in self._tensors.used:
                    reason = (
                        "a stored copy of the embedding" if name in model.anatomy.redundant else "no slice takes it"
                    )
                    self._result.dropped.setdefault(model.label(name), reason)


def _heads_of(model: Model) -> list[str]:
    """What a model's head is called: as it is stored, as a copy that it ignores, or as its class would call it."""
    stored = [model.anatomy.head] if model.anatomy.head is not None else sorted(model.anatomy.redundant)
    if stored or not model.anatomy.tied:
        return stored
    name = unstored_head(model.anatomy.embedding, model.checkpoint.config)
    return [] if name is None else [name]


def _deepest(models: Sequence[Model]) -> dict[str, int]:
    """All stacks of the models, each with the most layers that any of them has."""
    deepest: dict[str, int] = {}
    for model in models:
        for stack, count in model.anatomy.stacks.items():
            deepest[stack] = max(count, deepest.get(stack, 0))
    return deepest
