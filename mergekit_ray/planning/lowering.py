"""The data of lowering a recipe: models as planning sees them, slices cut to layers, and the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from mergekit_ray.architectures.anatomy import Anatomy
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.recipe import Missing
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Resolver
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Expression
from mergekit_ray.core.plan import SideFile
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.weights import Weights


@dataclass(frozen=True)
class Model:
    """An input as planning sees it: its tensors, config and side files, and what its names mean.

    Attributes:
        stored_names: what its files call the tensors that are seen under other names.
        side_files: what lies beside its weights, an adapter's after its base's.
        files: the same, that no store has, by name.
    """

    key: str
    reference: ModelReference
    checkpoint: Checkpoint
    weights: Weights
    anatomy: Anatomy
    stored_names: Mapping[str, str] = field(default_factory=dict)
    side_files: Sequence[SideFile] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """A tensor for lists and messages: the model, and what its files call the tensor."""
        return f"{self.reference}: {self.stored_names.get(name, name)}"

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """Every leading part of the names of its tensors, and the names."""
        parts = (name.split(".") for name in self.weights.specs)
        return frozenset(".".join(own[:length]) for own in parts for length in range(1, len(own) + 1))


@dataclass(frozen=True, slots=True)
class Rules:
    """What the recipe says of tensors that are not merged.

    Attributes:
        missing: what becomes of tensors that only some models have; None if it says nothing.
        include, exclude: patterns of names; what matches none of the former, or one of the latter, is not merged.
        source: the model that such tensors are copied from; None for the base.
    """

    missing: Missing | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    source: ModelReference | None = None

    def merges(self, name: str) -> bool:
        """Whether an output tensor is merged, rather than copied from one model."""
        is_included = self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)
        return is_included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def check(self, names: Sequence[str]) -> None:
        """Check that every pattern matches one of the output's tensors.

        Raises:
            PlanError: one matches none.
        """
        for key, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise PlanError(
                        f"no tensor of the output matches {pattern!r}{nearest(pattern, names)}",
                        where=key,
                        remedy="patterns are names with `*` for any run of characters, such as 'model.layers.0.*'",
                    )


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What the recipe says of numbers.

    Attributes:
        stored: dtype of the output, None for that of the inputs.
        inputs: dtype mergekit would do arithmetic in (``dtype``), None for that of the inputs.
        compute: dtype of all arithmetic, None for the inputs' own.
        seed: of all randomness.
    """

    stored: DType | None
    inputs: DType | None
    compute: DType | None
    seed: int


@dataclass
class Lowering:
    """The outcome: output tensors in model order, each with its expression.

    Attributes:
        groups: what comes before the layers, each layer, what comes after; empty groups are left out.
        expressions: by output name.
        layers: source of each output layer of the main stack: the model and its layer; None where they are the donor's.
        towers: the same of each other stack that modules cut anew, by its prefix.
        tied: whether the output's head is its embedding; None if there is no embedding.
        vocabulary: the models whose rows of embedding or head are in the output, by key.
        vocab_size: rows of the output's embedding where inputs had to be cut, else None.
        keeps_beyond: whether the donor's layers beyond those that its config counts are in the output.
        files: text that is written beside the weights, by file name.
        dropped, aliased, warnings: as in `core.plan.Plan`.
    """

    groups: list[list[TensorSpec]] = field(default_factory=list)
    expressions: dict[str, Expression] = field(default_factory=dict)
    layers: list[tuple[Model, int]] | None = None
    towers: dict[str, list[tuple[Model, int]]] = field(default_factory=dict)
    tied: bool | None = None
    vocabulary: dict[str, Model] = field(default_factory=dict)
    vocab_size: int | None = None
    keeps_beyond: bool = True
    files: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    aliased: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Operand:
    """One model's contribution to one output tensor: the tensor called ``name`` there."""

    model: Model
    name: str

    @property
    def exists(self) -> bool:
        """Whether the model has such a tensor."""
        return self.name in self.model.weights.specs

    @property
    def label(self) -> str:
        """See `Model.label`."""
        return self.model.label(self.name)


@dataclass(frozen=True)
class Cut:
    """A slice with its models looked up: which layers of which model it takes."""

    sources: tuple[Model, ...]
    first_layers: tuple[int, ...]
    base: Model | None
    base_first_layer: int
    num_layers: int
    is_all: bool
    parameters: Resolver
    source_parameters: tuple[Resolver, ...]

    @property
    def models(self) -> tuple[Model, ...]:
        """The sources, and the base if there is one."""
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def donor(self) -> Model:
        """Who gives what is not merged: the base, or the first source."""
        return self.base or self.sources[0]
