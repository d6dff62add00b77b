"""What a way to approximate rows of missing tokens declares of itself: enough to plan it without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.registry import Registry


class ApproximationDeclaration:
    """Name, parameters and needs of one way to make rows of an embedding for tokens that a model does not have.

    Attributes:
        name: what it is called.
        summary: one line.
        formula: in plain text: ``x`` is the donor's row of the missing token, ``a_i`` and ``b_i`` are the donor's and
            the model's rows of a token that both have.
        reference: paper or other source; empty for the obvious.
        parameters: pydantic model of its parameters.
        uses_model: it needs rows of the model.
        uses_donor: it needs the donor's rows of the same tokens, and of the missing ones.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    reference: ClassVar[str] = ""
    parameters: ClassVar[type[Parameters]] = Parameters
    uses_model: ClassVar[bool] = False
    uses_donor: ClassVar[bool] = False

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """What it holds beside its inputs and its result, for the projection of memory.

        Args:
            parameters: by name; what is not there has its default.
            num_shared: rows of the model, and of the donor where it is used.
            model_width: elements of the model's rows; 0 if they are not used.
            donor_width: the same of the donor's.
        """
        del parameters, num_shared, model_width, donor_width
        return 0

    @classmethod
    def row_work(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> float:
        """Floating-point operations of a row, about; 0 if they are not worth spreading over workers.

        Args:
            parameters: by name; what is not there has its default.
            num_shared: rows of the model, and of the donor where it is used.
            model_width: elements of the model's rows; 0 if they are not used.
            donor_width: the same of the donor's.
        """
        del parameters, num_shared, model_width, donor_width
        return 0.0


APPROXIMATIONS: Registry[type[ApproximationDeclaration]] = Registry(
    "approximation", "mergekit_ray.methods.approximation", "mergekit_ray.approximations"
)
