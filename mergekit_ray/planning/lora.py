"""A model with a LoRA adapter applied: a view, so that the adapted base is never written out.

What each tensor becomes is what PEFT's ``merge_and_unload`` makes of it (as of PEFT 0.21), but computed in higher
precision and rounded once:

    factors (lora_A, lora_B)            W + scale · B A; its transpose for embeddings and for GPT-2's Conv1D
    with a magnitude (DoRA)             each output of that scaled to its norm
    factors of all experts of a layer   W_e + scale · B_e A_e for each expert (target_parameters)
    bias of a factor (lora_bias)        bias + scale · b
    single rows (token indices)         replace those of an embedding
    whole tensors                       replace the base's: modules_to_save, trained biases, resized embeddings

Where head and embedding are tied they are one tensor, so what is added to either is added to both, and both if both are
adapted, although in training only one side saw it. A head or an embedding that is stored whole (``modules_to_save``)
unties them, unless PEFT was asked to keep the tie (``ensure_weight_tying``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ray.checkpoint.adapter import Adapter
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Concat, ExpertLowRank, Expression, LowRank, Merge
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lora_experts import Experts
from mergekit_ray.planning.lora_fit import AdapterFit, Product
from mergekit_ray.planning.weights import StoredWeights, Weights, rows_of


class LoraWeights:
    """A base with an adapter applied. See `mergekit_ray.planning.weights.Weights`.

    Args:
        base: the base's tensors.
        config: the base's ``config.json``.
        key: names the adapter in the plan.
        adapter: its headers.
        wide: compute in float64, as for a recipe that does.

    Attributes:
        config: that of the result: untied, or with another number of rows, where the adapter makes it so.

    Raises:
        ModelError: the adapter does not fit the base: a tensor that matches none of the base's, a wrong shape, half of
            a pair; it names tensor, adapter and what was expected.
    """

    def __init__(
        self, base: Weights, config: Mapping[str, Any], key: str, adapter: Adapter, *, wide: bool = False
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._stored = StoredWeights(key, adapter.checkpoint)
        self._dtype = DType.F64 if wide else DType.F32
        applied = AdapterFit(base.specs, config, adapter)
        self._tensors = applied.tensors
        self.config: Mapping[str, Any] = applied.config
        self.specs: Mapping[str, TensorSpec] = applied.specs
        self.inputs: Mapping[str, Checkpoint] = {**base.inputs, **self._stored.inputs}

    def expression(self, name: str, shape: tuple[int, ...] | None = None) -> Expression:
        """See `Weights.expression`. A tensor that the adapter leaves alone is the base's."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return self._base.expression(name, shape)
        if tensor.stored is None:
            x = self._base.expression(tensor.source, shape)
        else:
            x = self._stored.expression(tensor.stored, shape)
        if tensor.rows:
            x = self._with_rows(x, tensor.rows)
        dtype = DType.F64 if DType.F64 in (self._dtype, self.specs[name].dtype) else DType.F32
        for product in tensor.products:
            # Rounded once, after the last.
            x = self._add(x, product, dtype if product is tensor.products[-1] else DType.F64)
        return x if tensor.bias is None else self._add_bias(x, tensor.bias, dtype)

    def _add(self, x: Expression, product: Product, dtype: DType) -> LowRank | ExpertLowRank:
        if product.experts is not None:
            return self._add_experts(x, product, product.experts, dtype)
        change, rows = product.change, x.spec.shape[0]
        assert change.a is not None
        assert change.b is not None
        b, magnitude = self._stored.specs[change.b], change.magnitude
        # Of fewer rows, the leading ones: a factor that has a row for each is cut like the matrix itself.
        cut = None if product.transposed else rows
        return LowRank(
            x,
            self._stored.expression(change.a),
            self._stored.expression(change.b, None if cut is None else (cut, b.shape[1])),
            self._adapter.config.scale_of(product.module),
            product.transposed,
            dtype,
            None if magnitude is None else self._stored.expression(magnitude, None if cut is None else (cut,)),
        )

    def _add_experts(self, x: Expression, product: Product, experts: Experts, dtype: DType) -> ExpertLowRank:
        change = product.change
        assert change.a is not None
        assert change.b is not None
        a, b = self._stored.expression(change.a), self._stored.expression(change.b)
        rank = a.spec.shape[0] // experts.total
        if experts.number < experts.total:
            a = rows_of(a, experts.first * rank, (experts.first + experts.number) * rank)
        if experts.outputs[1] - experts.outputs[0] < b.spec.shape[0] and not product.transposed:
            b = rows_of(b, *experts.outputs)
        scale = self._adapter.config.scale_of(product.module)
        return ExpertLowRank(x, a, b, scale, experts.total, experts.first, product.transposed, dtype)

    def _add_bias(self, x: Expression, module: str, dtype: DType) -> Merge:
        stored = self._adapter.changes[module].bias
        assert stored is not None
        return Merge(
            method="linear",
            spec=TensorSpec(x.spec.name, dtype, x.spec.shape),
            inputs=(x, self._stored.expression(stored, x.spec.shape)),
            base=None,
            parameters={"normalize": False},
            input_parameters=({"weight": 1.0}, {"weight": self._adapter.config.scale_of(module)}),
            keys=("", ""),
            compute_dtype=DType.F64,
        )

    def _with_rows(self, x: Expression, replaced: Sequence[tuple[str, tuple[int, ...]]]) -> Expression:
        """``x`` with some of its rows replaced: by the last, where several do. Rows beyond its end are left out."""
        num_rows, dtype = x.spec.shape[0], x.spec.dtype
        theirs = {row: (stored, place) for stored, rows in replaced for place, row in enumerate(rows)}
        parts: list[Expression] = []
        start = 0
        for row, (stored, place) in sorted(theirs.items()):
            if row >= num_rows:
                break
            if start < row:
                parts.append(rows_of(x, start, row))
            parts.append(rows_of(self._stored.expression(stored), place, place + 1))
            start = row + 1
        if start < num_rows:
            parts.append(rows_of(x, start, num_rows))
        return Concat(tuple(part if part.spec.dtype is dtype else Cast(part, dtype) for part in parts), x.spec)
