"""The data of lowering a recipe: models as planning sees them, slices cut to layers, and the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergekit_ray.architectures.anatomy import Anatomy
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Resolver
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Expression
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.weights import Weights


@dataclass(frozen=True)
class Model:
    """An input as planning sees it: its tensors, config and side files, and what its names mean."""

    key: str
    reference: ModelReference
    checkpoint: Checkpoint
    weights: Weights
    anatomy: Anatomy


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
        tied: whether the output's head is its embedding; None if there is no embedding.
        vocab_size: rows of the output's embedding where inputs had to be cut, else None.
        files: text that is written beside the weights, by file name.
        dropped, aliased, warnings: as in `core.plan.Plan`.
    """

    groups: list[list[TensorSpec]] = field(default_factory=list)
    expressions: dict[str, Expression] = field(default_factory=dict)
    layers: list[tuple[Model, int]] | None = None
    tied: bool | None = None
    vocab_size: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    aliased: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Operand:
    """One model's contribution to one output tensor: the tensor called ``name`` there."""

    model: Model
    name: str


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
