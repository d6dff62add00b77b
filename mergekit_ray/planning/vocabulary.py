"""How many rows the tensors of the vocabulary get in the output, where models have more or fewer tokens.

Embedding, head and its biases must have as many rows as one another. What all models have is merged. Tokens beyond that
which the donor's config or tokenizer needs, as they travel with the output, keep the donor's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_ray.checkpoint.token_ids import token_ids
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Cast, Concat, Expression, Load
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.lowering import Model, Operand

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The rows of the output's vocabulary.

    Attributes:
        common: leading rows that all models have, which are merged.
        rows: of the output: ``common``, or as many as the donor has.
        donor: whose rows follow the common ones.
        needs: what needs them, in words; empty if nothing does.
    """

    common: int
    rows: int
    donor: Model
    needs: str = ""

    def completed(self, spec: TensorSpec, merged: Expression) -> tuple[TensorSpec, Expression]:
        """A tensor's spec and expression with the donor's rows below the merged ones.

        Raises:
            PlanError: the donor has no such rows, or not as they are stored.
        """
        if self.rows == self.common:
            return spec, merged
        stored = self._stored(spec)
        first = Location(
            stored.location.file,
            stored.location.start + spec.num_elements * stored.spec.dtype.itemsize,
            stored.location.end,
        )
        rows = self.rows - self.common
        below = TensorSpec(stored.spec.name, stored.spec.dtype, self._with_rows(spec, rows))
        rest: Expression = Load(stored.model, below, first)
        if below.dtype is not spec.dtype:
            rest = Cast(rest, spec.dtype)
        whole = TensorSpec(spec.name, spec.dtype, self._with_rows(spec, self.rows))
        return whole, Concat((merged, rest), whole)

    def name_in(self, name: str) -> str:
        """What the donor calls a tensor of the output: a tied one has the head's rows in its embedding."""
        anatomy = self.donor.anatomy
        is_stored = name in self.donor.weights.specs and name not in anatomy.redundant
        return name if is_stored or not anatomy.tied or anatomy.embedding is None else anatomy.embedding

    def warnings(self, found: Mapping[str, set[int]]) -> list[str]:
        """What to say of each tensor.

        Args:
            found: see `common_vocabulary`.
        """
        most = max(rows for of_tensor in found.values() for rows in of_tensor)
        if most == self.rows == self.common:
            return []  # the donor gives no rows, only a config with another number of them
        counts = f"between {self.common} and {max(most, self.rows)} rows"
        rest = "the rest left out"
        if self.needs:
            rest = f"the rest is that of {self.donor.reference}, needed by {self.needs}"
        return [
            f"{name} has {counts} in the models: the first {self.common} are merged, {rest}" for name in sorted(found)
        ]

    def _with_rows(self, spec: TensorSpec, rows: int) -> tuple[int, ...]:
        return (1, rows) if spec.shape == (1, self.common) else (rows, *spec.shape[1:])

    def _stored(self, spec: TensorSpec) -> Load:
        weights, name = self.donor.weights, self.name_in(spec.name)
        found = weights.expression(name) if name in weights.specs else None
        if isinstance(found, Load) and found.spec.shape == self._with_rows(spec, self.rows):
            return found
        match found:
            case None:
                reason = "it has no such tensor"
            case Load():
                reason = f"its own is {list(found.spec.shape)}"
            case _:
                reason = "its own is not stored as it is (an adapter, or codes)"
        raise PlanError(
            f"the models have {self.common} rows in common, and {self.donor.reference} needs more: {self.needs}. Its "
            f"rows cannot be added below them: {reason}",
            where=f"tensor {spec.name!r}",
            remedy="name a model with fewer tokens first, or as base_model, or give all models as many rows "
            "(transformers' resize_token_embeddings)",
        )


def vocabulary_axis(operand: Operand) -> int | None:
    """The dimension of a tensor that is as long as its model's embedding has rows.

    Returns:
        0; or 1 for a bias ``[1, rows]``, as ``final_logits_bias``; None if it has no such dimension, or is neither
        named nor placed like a tensor of the vocabulary.
    """
    anatomy, shape = operand.model.anatomy, operand.model.weights.specs[operand.name].shape
    if anatomy.embedding is None or operand.name not in (*anatomy.vocabulary, *anatomy.after):
        return None
    rows = operand.model.weights.specs[anatomy.embedding].shape[0]
    return 0 if shape[:1] == (rows,) else 1 if shape == (1, rows) else None


def common_vocabulary(found: Mapping[str, set[int]], donor: Model) -> Vocabulary | None:
    """What to make of vocabularies that differ; None where all tensors have as many rows as the donor's embedding.

    Args:
        found: for each tensor of the vocabulary, the numbers of rows that its models have.
        donor: whose config and tokenizer the output gets.

    Raises:
        CheckpointError, StorageError: the donor's tokenizer could not be read.
    """
    counts = {rows for of_tensor in found.values() for rows in of_tensor}
    embedding = donor.anatomy.embedding
    if not counts or embedding is None:
        return None
    common, rows = min(counts), donor.weights.specs[embedding].shape[0]
    if counts == {rows}:
        return None
    needs = []
    for what, ids in token_ids(donor.checkpoint).items() if rows > common else ():
        # What lies beyond the donor's own rows is of no use there either.
        lost = sorted(number for number in ids if common <= number < rows)
        if lost:
            more = f" and {len(lost) - _MAX_NAMED} more" if len(lost) > _MAX_NAMED else ""
            needs.append(f"{what} ({', '.join(map(str, lost[:_MAX_NAMED]))}{more})")
    return Vocabulary(common, rows if needs else common, donor, ", ".join(needs))
