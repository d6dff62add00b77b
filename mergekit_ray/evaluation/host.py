"""One window on the CPU: compiled loops compute what they can, torch the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mergekit_ray.core.expressions import Expression
from mergekit_ray.evaluation.pieces import Bytes, Pieces
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.evaluation.strategy import Choice
from mergekit_ray.evaluation.threads import hold_torch


class HostEvaluation:
    """One expression over one window.

    Args:
        expression: to be computed.
        choice: how, see `evaluation.strategy.choose`.
        pieces: the bytes of each of its loads.
        pool: threads to compute on.
        chunk_elements, allow_non_finite, references: as for `Evaluation`.
    """

    def __init__(
        self,
        expression: Expression,
        choice: Choice,
        pieces: Pieces,
        pool: ComputePool,
        *,
        chunk_elements: int = CHUNK_ELEMENTS,
        allow_non_finite: bool = False,
        references: Mapping[str, str] | None = None,
    ) -> None:
        self._expression = expression
        self._pieces = pieces
        self._pool = pool
        self._chunk_elements = chunk_elements
        self._allow_non_finite = allow_non_finite
        self._references = references
        self._compiled = None if choice.compiled is None else choice.compiled.begin(pieces, pool)
        self._by_torch: Callable[[int, Bytes], None] | None = None

    def fill(self, start: int, out: Bytes) -> None:
        """Write the elements from flat index ``start`` on, as many as there is room for.

        Raises:
            MergeError: see `Evaluation.fill`.
        """
        if self._compiled is not None:
            if self._compiled(start, out):
                return
            self._compiled = None  # what is not finite is torch's, which says where it comes from
        self._by_torch = self._by_torch or self._evaluation()
        self._by_torch(start, out)

    def _evaluation(self) -> Callable[[int, Bytes], None]:
        from mergekit_ray.evaluation.evaluate import Evaluation  # noqa: PLC0415 - imports torch
        from mergekit_ray.evaluation.nodes.base import Piece  # noqa: PLC0415
        from mergekit_ray.evaluation.scratch import as_tensor  # noqa: PLC0415

        hold_torch()
        dtype = self._expression.spec.dtype
        evaluation = Evaluation(
            self._expression,
            Piece.of(self._pieces),
            self._pool,
            chunk_elements=self._chunk_elements,
            allow_non_finite=self._allow_non_finite,
            references=self._references,
        )

        def fill(start: int, out: Bytes) -> None:
            evaluation.fill(start, start + out.size // dtype.itemsize, as_tensor(out, dtype))

        return fill
