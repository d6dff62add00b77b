"""Which tensor of a LoRA adapter acts on which of its base, and whether it fits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mergekit_ray.architectures.anatomy import Anatomy, anatomy, language_config, stating
from mergekit_ray.architectures.heads import unstored_head
from mergekit_ray.architectures.ties import ties_more
from mergekit_ray.checkpoint.adapter import Adapter, Change
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lora_experts import NESTED, Experts, parameter
from mergekit_ray.planning.matching.names import Names

_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Endings of the name of a head; a tied model may not store it."""

_MERGE_WITH_PEFT = "merge the adapter with PEFT (merge_and_unload) and name the result"

_CONV1D = {
    **dict.fromkeys(("gpt2", "imagegpt", "decision_transformer"), ("c_attn", "c_proj", "c_fc", "q_attn")),
    **dict.fromkeys(("openai-gpt", "clvp"), ("c_attn", "c_proj", "c_fc")),
}
"""Layers that keep their matrices as inputs by outputs, by the model's type. A square matrix does not tell."""


def is_conv1d(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether a layer keeps its matrix as inputs by outputs; None if the model's type does not tell."""
    leaves = _CONV1D.get(str(language_config(config).get("model_type")))
    return None if leaves is None else module.rpartition(".")[2] in leaves


@dataclass(frozen=True, slots=True)
class Product:
    """One pair of factors with what it is scaled by.

    Attributes:
        module: by whose name rank and scale are looked up.
        change: names the factors.
        transposed: the product is added transposed.
        experts: which part of the product it is, if the factors are those of all experts of a layer.
    """

    module: str
    change: Change
    transposed: bool
    experts: Experts | None = None


@dataclass(slots=True)
class Tensor:
    """How one tensor of the result comes about.

    Attributes:
        source: the base's tensor it starts from.
        stored: the adapter's tensor that replaces it, if one does.
        rows: what replaces single rows, in order: the adapter's tensor, and which rows it has.
        products: what is added, in order.
        bias: the module whose factor's bias is added.
    """

    source: str
    stored: str | None = None
    rows: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    bias: str | None = None


class AdapterFit:
    """What an adapter makes of a base's tensors.

    Args:
        specs: the base's tensors.
        config: the base's ``config.json``.
        adapter: its headers.

    Attributes:
        tensors: those of the result that are not simply the base's.
        specs: of the result.
        config: of the result.

    Raises:
        ModelError: see `mergekit_ray.planning.lora.LoraWeights`.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], adapter: Adapter) -> None:
        self._adapter = adapter
        self._base_specs = specs
        self._names = Names(specs)
        self._base_config = config
        self._anatomy: Anatomy = anatomy(specs, config, f"base of {adapter.where}")
        self._is_tied = self._anatomy.tied
        self.tensors: dict[str, Tensor] = {}
        self.config = config
        self.specs: dict[str, TensorSpec] = dict(specs)
        self._untie()
        self._replace()
        self._check_vocabulary()
        self._parameters: dict[str, str] = {}
        for module, change in adapter.changes.items():
            names = self._parameters_of(module)
            if names:
                self._change_experts(module, change, names)
            else:
                self._change(module, change)
        # The head last, like whole tensors.
        for module, stored in sorted(adapter.rows.items(), key=lambda item: self._is_head(f"{item[0]}.weight")):
            self._replace_rows(module, stored)

    # -- names ----------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> str | None:
        """The base's name of a tensor, if it has one that can be meant."""
        if name in self.specs or self._is_head(name):
            return name
        found = self._names.find(name)
        return found[0] if len(found) == 1 else None

    def _is_head(self, name: str) -> bool:
        """Whether it is the head of a tied model, which is its embedding."""
        unstored = name not in self._base_specs or name in self._anatomy.redundant
        return self._anatomy.tied and unstored and name.endswith(_HEADS)

    def _require(self, name: str, stored: str) -> str:
        found = self._find(name)
        if found is None and (several := self._names.find(name)):
            meant = " or ".join(map(repr, several))
            raise self._fault(f"tensor {stored!r} belongs to {name!r}, which in the base is {meant}", _MERGE_WITH_PEFT)
        if found is None and (module := self._new_module(name)):
            raise self._fault(
                f"it stores {module!r} whole (modules_to_save, tensor {stored!r}), which the base does not have: the "
                "result would be of another class, which no config.json describes",
                "load base and adapter with PEFT in the class it was trained in, merge them (merge_and_unload), save "
                "and name the result",
            )
        if found is None:
            raise self._fault(
                f"tensor {stored!r} belongs to {name!r}, which the base does not have{nearest(name, self._base_specs)}",
                "apply the adapter to the model it was trained on, or one with the same names",
            )
        return self._target(found)

    def _new_module(self, name: str) -> str | None:
        """The module to save that a tensor is of, if the base has none of it: the head of another class."""
        parts = name.split(".")
        modules = (".".join(parts[:count]) for count in range(1, len(parts)))
        saved = next((module for module in modules if self._adapter.config.is_saved(module)), None)
        return None if saved is None or any(f".{saved}." in f".{known}" for known in self._base_specs) else saved

    def _target(self, name: str) -> str:
        """The tensor that carries ``name``: a tied head's is the embedding."""
        if self._is_tied and self._is_head(name) and self._anatomy.embedding is not None:
            return self._anatomy.embedding
        return name

    def _fault(self, what: str, remedy: str) -> ModelError:
        return ModelError(what, where=self._adapter.where, remedy=remedy)

    # -- whole tensors --------------------------------------------------------------------------------------------

    def _untie(self) -> None:
        """Give the head a tensor of its own, if the adapter stores it or the embedding whole."""
        embedding = self._anatomy.embedding
        if not self._is_tied or embedding is None:
            return
        whole, saved = {}, {}
        for name, stored in self._adapter.replaced.items():
            found = self._find(name)
            if (
                found is None
                or stored.endswith(".base_layer.weight")
                or not (found == embedding or self._is_head(found))
            ):
                continue
            whole[self._is_head(found)] = found
            if self._adapter.config.is_saved(name.removesuffix(".weight")):
                saved[self._is_head(found)] = found
        if not saved or (self._adapter.config.keeps_ties and len(whole) == 2):
            return
        self._is_tied = False
        head = saved.get(True) or next(iter(self._anatomy.redundant), None) or self._adapted_head()
        head = head or unstored_head(embedding, self._base_config)
        if head is None:
            raise self._fault(
                f"it stores {embedding!r} whole, so the head that is tied to it must be stored too; nothing tells what "
                "the class calls a separate head",
                _MERGE_WITH_PEFT,
            )
        if ties_more(self._base_config):
            raise self._fault(
                "it stores the embedding or the head whole, and the base's class ties other tensors to each other as "
                "well: transformers unties all or nothing",
                _MERGE_WITH_PEFT,
            )
        for name, original in {head: embedding, **self._anatomy.copies}.items():
            self.tensors[name] = Tensor(source=original)
            spec = self._base_specs[original]
            self.specs[name] = TensorSpec(name, spec.dtype, spec.shape)
        changed = copy.deepcopy(dict(self._base_config))
        for part in [changed, *stating(changed, "tie_word_embeddings")]:
            part["tie_word_embeddings"] = False
        self.config = changed

    def _adapted_head(self) -> str | None:
        names = (f"{module}.weight" for module in self._adapter.changes)
        return next((name for name in names if self._is_head(name)), None)

    def _replace(self) -> None:
        # The head last: where it is the embedding, what is stored for it counts, as when PEFT loads one after another.
        ordered = sorted(self._adapter.replaced.items(), key=lambda item: self._is_head(item[0]))
        for name, stored in ordered:
            target = self._require(name, stored)
            known, given = self.specs[target], self._adapter.spec(stored)
            is_vocabulary = target in self._anatomy.vocabulary or self._is_head(target)
            if given.shape != known.shape and not (is_vocabulary and given.shape[1:] == known.shape[1:]):
                raise self._fault(
                    f"tensor {stored!r} has shape {list(given.shape)}, the base's {target!r} {list(known.shape)}",
                    "apply the adapter to the model it was trained on",
                )
            self.specs[target] = TensorSpec(target, known.dtype, given.shape)
            self._tensor(target).stored = stored

    def _check_vocabulary(self) -> None:
        """Embedding and head have as many rows as each other, and the config says so."""
        names = [n for n in self.specs if n in self._anatomy.vocabulary or (n in self.tensors and self._is_head(n))]
        before = {
            name: self._base_specs.get(name, self._base_specs.get(self._anatomy.embedding or "")) for name in names
        }
        rows = {name: self.specs[name].shape[0] for name in names}
        if all(spec is None or spec.shape[0] == rows[name] for name, spec in before.items()):
            return
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in rows.items())
            raise self._fault(
                f"it resizes only a part of the vocabulary ({listed} rows)",
                # With factors of the embedding alone, PEFT saves no head, whatever it is asked for.
                f"save the adapter with PEFT's save_embedding_layers=True, or {_MERGE_WITH_PEFT}",
            )
        changed = copy.deepcopy(dict(self.config))
        for part in stating(changed, "vocab_size") or [cast(dict[str, Any], language_config(changed))]:
            part["vocab_size"] = next(iter(rows.values()))
        self.config = changed

    def _replace_rows(self, module: str, stored: str) -> None:
        target = self._require(f"{module}.weight", stored)
        rows, given, known = self._adapter.config.tokens_of(module), self._adapter.spec(stored), self.specs[target]
        if not rows or given.shape != (len(rows), *known.shape[1:]) or not given.dtype.is_floating:
            raise self._fault(
                f"tensor {stored!r} is {given.dtype.value} {list(given.shape)}; trainable_token_indices lists "
                f"{counted(len(rows), 'row')} of {target!r}, which is {known.dtype.value} {list(known.shape)}",
                "save the adapter with PEFT again",
            )
        if max(rows) >= known.shape[0]:
            raise self._fault(
                f"it trains row {max(rows)} of {target!r} (trainable_token_indices), which has {known.shape[0]}",
                "apply the adapter to the model it was trained on, or save it with PEFT's save_embedding_layers=True",
            )
        if self._tensor(target).products:
            raise self._fault(f"it adapts {target!r} and trains single rows of it as well", _MERGE_WITH_PEFT)
        self._tensor(target).rows.append((stored, rows))

    # -- products -------------------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        return self.tensors.setdefault(name, Tensor(source=name))

    def _change(self, module: str, change: Change) -> None:
        parts = ("lora_embedding_A", "lora_embedding_B") if change.is_embedding else ("lora_A", "lora_B")
        for part, stored in zip(parts, (change.a, change.b), strict=True):
            if stored is None:
                given = change.a or change.b or change.magnitude or change.bias
                raise self._fault(
                    f"{part} of {module!r} is missing, though {given!r} is there",
                    "the adapter is incomplete: download or copy it again, or save it with PEFT again",
                )
        assert change.a is not None
        target = self._require(f"{module}.weight", change.a)
        self._check_kinds(target, change)
        transposed = self._check_shapes(module, target, change)
        self._tensor(target).products.append(Product(module, change, transposed))
        if change.bias is not None:
            self._change_bias(module, change.bias)

    def _parameters_of(self, module: str) -> list[str]:
        """The parameters, none of them a module's weight, of which one is adapted by what is stored for a module."""
        plain = module.partition(NESTED)[0]
        names = self._adapter.config.parameters_of(plain)
        return [] if self._find(f"{plain}.weight") is not None else names

    def _change_experts(self, module: str, change: Change, names: Sequence[str]) -> None:
        plain = module.partition(NESTED)[0]
        if change.a is None or change.b is None or change.bias is not None or change.magnitude is not None:
            raise self._fault(f"{module!r} has no pair of factors and nothing else", "save the adapter with PEFT again")
        a, b = (self._adapter.spec(stored) for stored in (change.a, change.b))
        known = [found for name in names if (found := parameter(plain, name, self._find, self.specs)) is not None]
        fitting = [
            (each, transposed)
            for each in known
            if len(a.shape) == len(b.shape) == 2
            and a.shape[0] == b.shape[1] == each.shape[0] * self._adapter.config.rank_of(each.name)
            and (transposed := each.transposed((b.shape[0], a.shape[1]), self._base_config)) is not None
            and all(self.specs[part.tensor].dtype.is_floating for part in each.parts)
        ]
        if len(fitting) != 1 or not (a.dtype.is_floating and b.dtype.is_floating):
            shapes = ", ".join(f"{each.name} {list(each.shape)}" for each in known) or "none of them in the base"
            raise self._fault(
                f"{change.a!r} {list(a.shape)} and {change.b!r} {list(b.shape)} adapt one of the parameters "
                f"{', '.join(names)} (target_parameters), and {'several' if fitting else 'none'} would fit: {shapes}",
                "apply the adapter to the model it was trained on; else " + _MERGE_WITH_PEFT,
            )
        ((found, transposed),) = fitting
        if (twice := self._parameters.setdefault(found.name, module)) != module:
            raise self._fault(f"{twice!r} and {module!r} both fit {found.name!r}", _MERGE_WITH_PEFT)
        for part in found.parts:
            self._tensor(part.tensor).products.append(Product(found.name, change, transposed, part))

    def _check_kinds(self, target: str, change: Change) -> None:
        spec = self.specs[target]
        if not spec.dtype.is_floating or len(spec.shape) != 2:
            raise self._fault(
                f"{change.a!r} adapts {target!r}, which is no matrix of weights: {spec.dtype.value} {list(spec.shape)}",
                _MERGE_WITH_PEFT,
            )
        for stored in (change.a, change.b, change.magnitude, change.bias):
            if stored is not None and not self._adapter.spec(stored).dtype.is_floating:
                raise self._fault(
                    f"tensor {stored!r} is not floating point ({self._adapter.spec(stored).dtype.value})",
                    "save the adapter with PEFT again",
                )

    def _check_shapes(self, module: str, target: str, change: Change) -> bool:
        """Whether the product is transposed."""
        assert change.a is not None
        assert change.b is not None
        a, b = self._adapter.spec(change.a).shape, self._adapter.spec(change.b).shape
        rows, columns = self.specs[target].shape
        rank = self._adapter.config.rank_of(module)
        product = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None
        fitting = [(columns, rows)] if change.is_embedding else [(rows, columns), (columns, rows)]
        if product not in fitting or a[0] != rank:
            tall, wide = product if product in fitting else fitting[0]
            raise self._fault(
                f"{change.a!r} {list(a)} and {change.b!r} {list(b)} do not fit {target!r} {[rows, columns]} with rank "
                f"{rank}: expected {[rank, wide]} and {[tall, rank]}",
                "apply the adapter to the model it was trained on; check r and rank_pattern in its config",
            )
        transposed = self._is_transposed(module, change, product, (rows, columns))
        self._check_magnitude(change, columns if transposed else rows)
        return transposed

    def _is_transposed(self, module: str, change: Change, product: tuple[int, int], shape: tuple[int, int]) -> bool:
        if change.is_embedding:
            return True
        if shape[0] != shape[1]:
            return product != shape
        known = is_conv1d(self._base_config, module)
        return self._adapter.config.fan_in_fan_out if known is None else known

    def _check_magnitude(self, change: Change, num_outputs: int) -> None:
        if self._adapter.config.dora != (change.magnitude is not None):
            named = f"{change.magnitude!r} is there" if change.magnitude else f"{change.a!r} has no magnitude"
            raise self._fault(
                f"{named}, and use_dora is {str(self._adapter.config.dora).lower()}", "save the adapter with PEFT again"
            )
        if change.magnitude is not None and self._adapter.spec(change.magnitude).shape != (num_outputs,):
            raise self._fault(
                f"tensor {change.magnitude!r} has shape {list(self._adapter.spec(change.magnitude).shape)}, "
                f"expected {[num_outputs]}",
                "apply the adapter to the model it was trained on",
            )

    def _change_bias(self, module: str, stored: str) -> None:
        if self._find(f"{module}.bias") is None:
            raise self._fault(
                f"tensor {stored!r} is the bias of a factor (lora_bias), and {module!r} of the base has no bias to add "
                "it to",
                "use it as an adapter (PEFT cannot merge it either), or train it without lora_bias",
            )
        target = self._require(f"{module}.bias", stored)
        if self._adapter.spec(stored).shape != self.specs[target].shape:
            raise self._fault(
                f"tensor {stored!r} has shape {list(self._adapter.spec(stored).shape)}, the base's {target!r} "
                f"{list(self.specs[target].shape)}",
                "apply the adapter to the model it was trained on",
            )
        self._tensor(target).bias = module
