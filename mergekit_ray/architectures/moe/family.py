"""What a family of Mixture-of-Experts models is: tables of tensor names, and a config made from a dense model's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mergekit_ray.architectures.anatomy import Anatomy, is_buffer
from mergekit_ray.core.tensors import TensorSpec

_MAX_LISTED = 6

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
"""The feed-forward layer of Llama and all that are built like it: ``down(act(gate(x)) * up(x))``."""

ATTENTION = frozenset(f"self_attn.{name}_proj.weight" for name in "qkvo")
ATTENTION_BIASES = frozenset(f"self_attn.{name}_proj.bias" for name in "qkvo")
QK_NORMS = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
OUTSIDE = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
STACK = "model.layers"


@dataclass(frozen=True, slots=True)
class DenseModel:
    """The model that everything outside the feed-forward layers comes from; a Mixture of Experts if it is added to.

    Attributes:
        reference: as the recipe names it.
        config: its ``config.json``.
        specs: its tensors.
        anatomy: what their names mean.
    """

    reference: str
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    anatomy: Anatomy

    @property
    def model_type(self) -> str:
        """As its config says, empty if it does not."""
        return str(self.config.get("model_type") or "")

    def layer_names(self) -> dict[str, int]:
        """Every name below a layer (buffers left out) with the number of layers that have it."""
        counts: dict[str, int] = {}
        for rests in self.anatomy.layers.get(self.anatomy.main or "", ()):
            for rest in rests:
                if not is_buffer(f"{self.anatomy.main}.0.{rest}"):
                    counts[rest] = counts.get(rest, 0) + 1
        return counts

    def shape(self, rest: str) -> tuple[int, ...]:
        """Shape of a tensor of the first layer."""
        return self.specs[f"{self.anatomy.main}.0.{rest}"].shape


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a recipe asks of a family.

    Attributes:
        num_experts: routed experts.
        experts_per_token: how many of them each token uses.
        has_shared: whether there is an expert that every token uses.
        packed: whether all experts of a layer go into one tensor for each projection.
    """

    num_experts: int
    experts_per_token: int
    has_shared: bool = False
    packed: bool = False


@dataclass(frozen=True)
class MoeNames:
    """What a family calls the tensors below a layer. ``{expert}`` stands for an expert's number.

    Attributes:
        experts: the dense model's feed-forward tensors, each with its name in a routed expert.
        residual: those of them that write to the residual stream, which ``residual_scale`` multiplies.
        router: one row for each routed expert: ``[num_experts, hidden]``.
        shared: the feed-forward tensors with their names in the shared expert; None if the family has none.
        shared_gate: ``[1, hidden]``, None if the shared expert is added as it is.
        packed: tensors of all experts with the feed-forward tensors that they hold of each expert, in order:
            ``[num_experts, rows of all of them, columns]``. None if there is no such layout.
        packed_router: name of the router beside packed experts.
    """

    experts: Mapping[str, str]
    residual: frozenset[str]
    router: str
    shared: Mapping[str, str] | None = None
    shared_gate: str | None = None
    packed: Mapping[str, tuple[str, ...]] | None = None
    packed_router: str | None = None


PACKED: Mapping[str, tuple[str, ...]] = {"mlp.experts.gate_up_proj": (GATE, UP), "mlp.experts.down_proj": (DOWN,)}
"""What transformers 5 calls packed experts, whatever the family."""


def projections(prefix: str) -> dict[str, str]:
    """The three tensors of a feed-forward layer that are called the same under ``prefix``."""
    return {rest: f"{prefix}.{rest.split('.')[1]}.weight" for rest in (GATE, UP, DOWN)}


class MoeFamily(ABC):
    """A family of Mixture-of-Experts models that can be put together from dense ones.

    Attributes:
        name: the ``architecture`` of the YAML, and mostly the ``model_type`` of the result.
        aliases: other spellings of the YAML.
        class_name: its class in transformers.
        dense_types: values of ``model_type`` of the dense models it takes.
        rank: of several that fit, the lowest is taken.
        table: its names, where they are the same for all dense models.
        layer_names: what a layer has beside its feed-forward part.
        optional_names: what it may have, all of it or none.
        zero_biases: biases that every layer has and that are zero where the dense model has none, each with the weight
            whose rows it belongs to.
    """

    name: ClassVar[str]
    aliases: ClassVar[Sequence[str]] = ()
    class_name: ClassVar[str]
    dense_types: ClassVar[Sequence[str]]
    rank: ClassVar[int]
    table: ClassVar[MoeNames]
    layer_names: ClassVar[frozenset[str]]
    optional_names: ClassVar[frozenset[str]] = frozenset()
    zero_biases: ClassVar[Mapping[str, str]] = {}

    def holds(self, model: DenseModel) -> bool:
        """Whether a model is of this family already."""
        return model.model_type == self.name

    def dense_types_of(self, model_type: str) -> Sequence[str]:
        """The ``model_type`` of dense models whose experts fit into a model of this family with that ``model_type``."""
        del model_type
        return self.dense_types

    def mixture_names(self, mixture: DenseModel) -> MoeNames:
        """The names of the tensors of a model that is of this family already."""
        del mixture
        return self.table

    def names(self, base: DenseModel) -> MoeNames:
        """The names of its tensors."""
        del base
        return self.table

    @abstractmethod
    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """Its ``config.json``, but for the dtype and whether embedding and head are tied."""

    def files(self, base: DenseModel) -> Mapping[str, str]:
        """Text files that travel with the checkpoint, by name: code for a result that transformers has no class for."""
        del base
        return {}

    def blank_shared_rows(self, base: DenseModel) -> int:
        """Inner size of an all-zero shared expert, for families that cannot do without one; 0 for all others."""
        del base
        return 0

    def own_objections(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """What else does not fit, once the names do."""
        del base, wanted
        return []

    def caveats(self, wanted: Wanted) -> list[str]:
        """What the user should know of a result that this family holds."""
        del wanted
        return []

    def objections(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """Why the family cannot hold the result, in words; empty if it can."""
        if base.model_type not in self.dense_types:
            return [f"takes {' or '.join(self.dense_types)} models, found {base.model_type or 'no model_type'}"]
        if base.anatomy.main != STACK:
            return [f"expects the layers to be called {STACK}.<n>, found {base.anatomy.main}"]
        names = self.names(base)
        found = self._misnamed(base, names)
        if wanted.has_shared and names.shared is None:
            found.append("has no shared experts")
        if wanted.packed and names.packed is None:
            found.append("has no packed layout of its experts")
        return found or self.own_objections(base, wanted)

    def _misnamed(self, base: DenseModel, names: MoeNames) -> list[str]:
        """Tensors it has no place for, and tensors it needs and does not find in every layer."""
        counts = base.layer_names()
        outside = {n for n in (*base.anatomy.before, *base.anatomy.after) if not is_buffer(n)} - base.anatomy.redundant
        known = self.layer_names | self.optional_names | self.zero_biases.keys() | names.experts.keys()
        strange = sorted(outside - OUTSIDE) + sorted(f"{STACK}.*.{rest}" for rest in counts.keys() - known)
        needed = self.layer_names | names.experts.keys() | (counts.keys() & self.zero_biases.keys())
        if counts.keys() & self.optional_names:
            needed |= self.optional_names
        absent = sorted(rest for rest in needed if counts.get(rest, 0) != base.anatomy.num_layers)
        found = []
        if strange:
            found.append(f"has no place for {_some(strange)}")
        if absent:
            found.append(f"needs in every layer {_some(absent)}")
        return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
