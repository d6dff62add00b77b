"""What a merge method's arithmetic looks like, and what the evaluator gives it.

A method sees tensors only: no YAML, no storage, no Ray. It subclasses one of three bases:

- `ElementwiseMethod`: `combine` fills a run of output elements from the same run of the inputs.
- `ReduceMethod`: first `statistics` over the whole tensor (in fixed blocks, so that the result does not depend on how
  the tensor is later cut), then `combine`.
- `WholeMethod`: `combine_whole` gets everything at once.

All tensors handed to a method are 1-D in `compute_dtype` for runs, or in the tensor's shape for whole ones; rounding to
the output dtype is the evaluator's. torch is imported for annotations only: declarations can be read without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from mergekit_ray.core.declaration import Access, MethodDeclaration
from mergekit_ray.methods.shared.scratch import Scratch

if TYPE_CHECKING:
    import torch

    from mergekit_ray.methods.shared.combinations import Combination
    from mergekit_ray.methods.shared.random_mask import RandomMask

R = TypeVar("R")

BLOCK_ELEMENTS = 1 << 18
"""Elements in a block of `Operands.map_blocks` on the CPU. Fixed, whatever the chunk size: sums taken per block and
added in block order are the same for every chunk size and number of threads."""


class Chunk(Protocol):
    """A run of elements ``[start, stop)`` of the flattened tensor.

    Attributes:
        start, stop: flat element indices in the whole tensor.
        inputs: one 1-D tensor per model in compute dtype. They are scratch: the method may overwrite them.
        base: the base's run, or None. May be overwritten too.
        scratch: more working memory.
    """

    start: int
    stop: int
    inputs: Sequence[torch.Tensor]
    base: torch.Tensor | None
    scratch: Scratch


class Operands(Protocol):
    """The tensor being merged, as a method sees it beside the elements themselves.

    Attributes:
        shape: of the output tensor (and of every input).
        num_elements: product of the shape.
        num_inputs: models beside the base.
        parameters: the method's global parameters here (an instance of its ``global_parameters``).
        input_parameters: per-model parameters, one per input.
        keys: one string per input, to seed randomness with.
        compute_dtype: torch dtype of all arithmetic.
        block_elements: of a block: `BLOCK_ELEMENTS`, or a power of two times that where small runs keep a device idle.
    """

    shape: tuple[int, ...]
    num_elements: int
    num_inputs: int
    parameters: Any
    input_parameters: Sequence[Any]
    keys: Sequence[str]
    compute_dtype: torch.dtype
    block_elements: int

    def map_blocks(self, function: Callable[[Chunk], R], block_elements: int | None = None) -> list[R]:
        """``function`` over all blocks (the last may be shorter), in parallel; results in order.

        Args:
            function: called with each block.
            block_elements: another number where blocks must end where rows do. It must depend on nothing but the shape
                and the usual number, and memory grows with it.
        """
        ...

    def map_some(self, indices: Sequence[int], function: Callable[[Chunk], R]) -> list[R]:
        """``function`` over the blocks of the usual size with these indices, in parallel; results in order."""
        ...

    def block(self, index: int, function: Callable[[Chunk], R]) -> R:
        """``function`` over one block of the usual size."""
        ...


class ElementwiseMethod(MethodDeclaration):
    """A method that fills any run of elements from the same run of its inputs.

    Attributes:
        portable: whether what it chooses (which elements are kept, say) is the same on every processor. It is where
            choices follow from additions, multiplications, divisions, square roots and comparisons, which are rounded
            alike everywhere; not where they follow from exponentials and similar functions. A method that is not
            portable works on the CPU only.
    """

    access: ClassVar[Access] = Access.ELEMENTWISE
    portable: ClassVar[bool] = True

    @abstractmethod
    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """The merged run: a 1-D tensor in compute dtype, which may be one of the chunk's own tensors."""


class SummedTensor(Protocol):
    """A tensor of which a `SumMethod` is asked for the sum.

    Attributes:
        shape: of the tensor.
        parameters: the method's global parameters here (an instance of its ``global_parameters``).
        input_parameters: per-model parameters, one per input.
        keys: one string per input, to seed randomness with.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - see the class

    @property
    def parameters(self) -> Any: ...  # noqa: D102

    @property
    def input_parameters(self) -> Sequence[Any]: ...  # noqa: D102

    @property
    def keys(self) -> Sequence[str]: ...  # noqa: D102

    def inner_products(self) -> list[float]:
        """Of each pair ``i <= j`` of vectors over the whole tensor, row by row of the upper triangle, in float64.

        All NaN if any is not finite. To be asked for once, and only by a method that sees the whole tensor.
        """
        ...

    def masked_norms(self, masks: Sequence[RandomMask]) -> list[tuple[float, float]]:
        """Of each input's change ``‖δ‖₁``, and the same of what its mask keeps; NaN for masks that keep all or nothing.

        To be asked for once, and only by a method that sees the whole tensor.
        """
        ...


class SumMethod(ElementwiseMethod):
    """A method with a compiled loop: its result is a sum of the models or of their changes, or something as simple.

    Attributes:
        masks: whether `sum_of` gives a `Kept`, whose loop takes bfloat16 and float32 only. The others take any floating
            dtypes.
    """

    masks: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def sum_of(cls, tensor: SummedTensor) -> Combination | None:
        """What `combine` does where the compute dtype is float32; None where it does something else.

        Raises:
            MergeError: there is no such sum, such as with weights that are to be normalised and sum to zero.
        """


def is_portable(method: type[MethodDeclaration]) -> bool:
    """Whether a method may be given to other processors than the CPU, see `ElementwiseMethod`."""
    return not issubclass(method, ElementwiseMethod) or method.portable


class ReduceMethod(ElementwiseMethod):
    """A method that needs statistics of the whole tensor before it fills runs of elements."""

    access: ClassVar[Access] = Access.REDUCE

    @abstractmethod
    def statistics(self, operands: Operands) -> Any:
        """Whatever `combine` needs, computed with `Operands.map_blocks`."""


class WholeMethod(MethodDeclaration):
    """A method that cannot be cut: it gets and returns whole tensors."""

    access: ClassVar[Access] = Access.WHOLE

    @abstractmethod
    def combine_whole(
        self, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, operands: Operands
    ) -> torch.Tensor:
        """The merged tensor in compute dtype and in ``operands.shape``."""
