"""What a merge method declares of itself: enough to validate a recipe and plan it without torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class BaseUse(enum.Enum):
    """Whether a method works with a base model."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    FORBIDDEN = "none"


class Access(enum.Enum):
    """What a method must see at once."""

    ELEMENTWISE = "elementwise"
    """Any run of elements alone: large tensors are streamed in windows."""
    REDUCE = "reduce"
    """Statistics over the whole tensor first, then any run of elements."""
    WHOLE = "whole"
    """The whole tensor."""


class Parameters(BaseModel):
    """Base of a method's parameter models. Unknown names are errors; ``lambda`` is declared by alias.

    Each field is one scalar of the YAML; its `Field(description=...)` is what ``mergekit-ray methods`` prints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @classmethod
    def check_together(cls, values: Mapping[str, Any]) -> None:
        """Refuse values that are fine one by one, but not together.

        Asked at planning for each tensor, since gradients and filters give each its own.

        Args:
            values: by their YAML names, of the declared types, defaults included.

        Raises:
            MergeError: says which, and what to write.
        """


class MethodDeclaration:
    """Names, parameters and needs of one merge method.

    Attributes:
        name: the ``merge_method`` of the YAML.
        summary: one line.
        formula: the formula, in plain text.
        reference: paper or other source, as a URL or citation; empty for the obvious.
        base: whether a base model is needed.
        base_is_input: the base is one of the two models being merged (slerp, nearswap): the recipe lists two models,
            one of them the base, or one model beside it.
        min_models, max_models: how many models beside the base; None for no limit.
        access: what it must see at once.
        model_parameters: pydantic model of the parameters looked up for each model.
        global_parameters: pydantic model of the parameters looked up once per output tensor.
        propagates_non_finite: a NaN or infinity in any input always makes the result non-finite, so checking the
            result is enough.
        widens: with ``compute_dtype: inputs``, models are rounded to 16 bits where the recipe says so, and arithmetic
            on them is float32 nevertheless, as it is in mergekit.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    reference: ClassVar[str] = ""
    base: ClassVar[BaseUse] = BaseUse.FORBIDDEN
    base_is_input: ClassVar[bool] = False
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    access: ClassVar[Access] = Access.ELEMENTWISE
    model_parameters: ClassVar[type[Parameters]] = Parameters
    global_parameters: ClassVar[type[Parameters]] = Parameters
    propagates_non_finite: ClassVar[bool] = False
    widens: ClassVar[bool] = False

    @classmethod
    def parameter_names(cls) -> dict[str, str]:
        """YAML names of all parameters, each with its scope: ``"model"`` or ``"global"``."""
        scopes = {"model": cls.model_parameters, "global": cls.global_parameters}
        return {
            str(field.alias or name): scope
            for scope, model in scopes.items()
            for name, field in model.model_fields.items()
        }

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any], input_parameters: Sequence[Mapping[str, Any]]) -> None:
        """Refuse parameters with which no tensor can be merged, whatever is in it, such as weights that cancel.

        Asked at planning for each tensor, as `Parameters.check_together`.

        Args:
            parameters: the global ones.
            input_parameters: the per-model ones, one per model beside the base.

        Raises:
            MergeError: says which, and what to write.
        """

    @classmethod
    def adds_to_base(cls) -> bool:
        """Whether it adds to the base what each model says: of no model, the result is the base."""
        return cls.base is BaseUse.REQUIRED and not cls.base_is_input and cls.min_models == 1

    @classmethod
    def effective_access(cls, parameters: dict[str, Any]) -> Access:
        """Access needed with these global parameters; a method may need less than it declares (dare, no rescale)."""
        del parameters
        return cls.access

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """What a method holds that must see all of a tensor, for the projection of memory.

        Its statistics, that is; of one that needs whole tensors all but its inputs, its base and its result.

        Args:
            shape: of the tensor.
            num_models: models beside the base.
            itemsize: bytes of an element in compute dtype.
        """
        del shape, num_models, itemsize
        return 0
