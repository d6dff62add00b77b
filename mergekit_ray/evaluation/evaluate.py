"""Evaluation of one expression, in cache-sized chunks.

An expression is compiled to nodes once per output tensor. A node fills any run of its elements into a scratch buffer
that stays in cache, so intermediates never touch main memory and scratch does not grow with the tensor. Chunks run on a
pool of threads; every number is independent of how the tensor was cut and of how many threads there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Expression, Merge, Stored, stored
from mergekit_ray.core.expressions.quantised import non_finite_codes
from mergekit_ray.core.sizes import counted
from mergekit_ray.evaluation.nodes.base import (
    Compilation,
    Guard,
    Loaded,
    NonFiniteError,
    Piece,
    fill_parallel,
)
from mergekit_ray.evaluation.nodes.quantised import first_non_finite
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS, ComputePool


class NonFiniteReport:
    """Says where a NaN or infinity that was met comes from.

    Args:
        expression: that was computed.
        pieces: the bytes of each of its leaves that is read, in host memory.
        references: the models as the recipe names them, by key.
        check_finite: False if NaN and infinities are allowed, and nothing needs reporting.
    """

    def __init__(
        self,
        expression: Expression,
        pieces: Mapping[Stored, Piece],
        references: Mapping[str, str],
        *,
        check_finite: bool,
    ) -> None:
        self._expression = expression
        self._pieces = pieces
        self._references = references
        self._check_finite = check_finite

    def error(self) -> MergeError:
        """What to raise."""
        try:
            self.raise_for_inputs()
        except MergeError as error:
            return error
        dtypes = dict.fromkeys(x.spec.dtype.config_name for x in _rounded(self._expression))
        of_stages = " of one of the stages" if len(dtypes) > 1 else ""
        return MergeError(
            f"the merged values{of_stages} overflow {' or '.join(dtypes)} or are not numbers, though all "
            "inputs are finite",
            where=f"tensor {self._expression.spec.name!r}",
            remedy="check weights and scales, choose a dtype with more range (bfloat16, float32), "
            "or pass `options=MergeOptions(allow_non_finite=True)`",
        )

    def raise_for_inputs(self) -> None:
        """Raise for the first input that holds a NaN or an infinity, if there is one.

        Raises:
            MergeError: naming the tensor, the model and the place.
        """
        if not self._check_finite:
            return
        codes = non_finite_codes(self._expression)
        for leaf in stored(self._expression):
            if leaf not in codes and not leaf.spec.dtype.is_floating:
                continue
            if leaf not in self._pieces:
                continue  # a window of a concatenation has the inputs of the parts it touches
            piece = self._pieces[leaf]
            found = first_non_finite(piece.data, codes.get(leaf))
            if found is not None:
                load, index = leaf.origin(piece.start + found.index)
                many = counted(found.count, "such value")
                raise MergeError(
                    f"{found.value} in the input, first at flat index {index} ({many} read)",
                    where=f"model {self._references.get(load.model, load.model)}, tensor {load.spec.name!r}",
                    remedy="use an undamaged checkpoint, or pass `options=MergeOptions(allow_non_finite=True)` "
                    "to merge it as it is",
                )


class Evaluation:
    """One expression over inputs in memory.

    Args:
        expression: to be computed.
        pieces: the bytes of each of its leaves that is read: all of the tensor, or the window that will be asked for.
        pool: threads to compute on, and on which device.
        chunk_elements: elements handled at a time, None for all at once; changes speed, never the result.
        allow_non_finite: let NaN and infinities pass.
        references: the models as the recipe names them, by key, for messages.
        sources: what is read where the pool computes on a device; ``pieces`` are in host memory.

    The constructor runs the methods' statistics, so the pieces must be complete then.

    Attributes:
        all_finite: on a device, whether all that was filled so far is finite: a 0-dimensional boolean there. Nothing is
            raised for it; see `report`.
        report: what to say of a NaN or infinity.
    """

    def __init__(
        self,
        expression: Expression,
        pieces: Mapping[Stored, Piece],
        pool: ComputePool,
        *,
        chunk_elements: int | None = CHUNK_ELEMENTS,
        allow_non_finite: bool = False,
        references: Mapping[str, str] | None = None,
        sources: Mapping[Stored, Loaded] | None = None,
    ) -> None:
        check_finite = not allow_non_finite
        self.report = NonFiniteReport(expression, pieces, references or {}, check_finite=check_finite)
        self._expression = expression
        self._pool = pool
        self._chunk_elements = chunk_elements
        # Every element passes through `fill` once, so statistics are taken unguarded.
        on_cpu = pool.device.type == "cpu"
        self.all_finite = None if on_cpu else torch.ones((), dtype=torch.bool, device=pool.device)
        compilation = Compilation(pieces if sources is None else sources, pool, Guard(all_finite=self.all_finite))
        result_guard = Guard(result=check_finite and expression.spec.dtype.is_floating, all_finite=self.all_finite)
        guard = compilation.guard
        # A method that drops elements may drop what an earlier stage could not hold.
        guard.result = check_finite and not expression.propagates_non_finite
        self._node = compilation.compile(expression, guard if isinstance(expression, Stored) else result_guard)
        try:
            self._node.prepare()
        except torch.OutOfMemoryError:
            raise
        except NonFiniteError:
            raise self.report.error() from None
        except (ValueError, ArithmeticError, RuntimeError):
            self.report.raise_for_inputs()
            raise
        except MergeError as error:
            self._name_tensor(error)
            raise
        guard.inputs = check_finite and (isinstance(expression, Stored) or not expression.propagates_non_finite)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write elements ``[start, stop)`` to ``out``, a 1-D tensor of the expression's dtype, on the pool's device.

        Raises:
            MergeError: an input or the result is not finite (unless allowed); names the tensor and the model.
        """
        try:
            fill_parallel(self._node, start, stop, out, self._pool, self._chunk_elements or stop - start)
        except NonFiniteError:
            raise self.report.error() from None
        except MergeError as error:
            self._name_tensor(error)
            raise

    def _name_tensor(self, error: MergeError) -> None:
        """A method knows no names: say which tensor it was merging."""
        if error.where is None:
            error.where = f"tensor {self._expression.spec.name!r}"


def _rounded(x: Expression) -> Iterator[Expression]:
    """The merges that a tensor goes through, the first one first; then itself."""
    for child in x.children():
        yield from (each for each in _rounded(child) if isinstance(each, Merge))
    yield x
