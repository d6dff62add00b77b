"""One output tensor: which input tensors make it, whether they fit together, and its expression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from mergekit_ray.architectures.anatomy import is_buffer, place_of
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.declaration import BaseUse, MethodDeclaration
from mergekit_ray.core.dtypes import DType, promote
from mergekit_ray.core.errors import MergeError, PlanError
from mergekit_ray.core.expressions import Cast, Expression, Merge, Scale
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Arithmetic, Cut, Lowering, Model, Operand, Rules
from mergekit_ray.planning.matching.mismatches import Mismatches
from mergekit_ray.planning.matching.partial import PartialTensors
from mergekit_ray.planning.vocabulary import Vocabulary, vocabulary_axis


class TensorLowering:
    """Adds output tensors to a `Lowering`, one by one.

    Attributes:
        module: the name of the recipe's module whose tensors are added; None if it has none.
        mismatches: tensors that do not fit together; collected so that all can be told at once.
        partial: decides on tensors that only some models have.
        used: (model key, tensor name) of every input tensor that was asked for.
        refused: tensors that the method cannot merge with their parameters, whatever is in them: names by models and
            error (what, remedy).
        vocabulary: numbers of rows found, by name, of the tensors with a row for each token.
    """

    def __init__(
        self,
        method: type[MethodDeclaration],
        arithmetic: Arithmetic,
        rules: Rules,
        models: Mapping[ModelReference, Model],
        donor: Model,
        result: Lowering,
        common: Vocabulary | None,
    ) -> None:
        self._method = method
        self._arithmetic = arithmetic
        self._rules = rules
        self._donor = donor
        self._is_raw = donor.checkpoint.is_raw
        self._source = None if rules.source is None else models[rules.source]
        self._result = result
        self.mismatches = Mismatches(models.values())
        self.partial = PartialTensors(rules.missing, donor, result, self.mismatches)
        self.refused: dict[tuple[str, str, str | None], list[str]] = {}
        self.used: set[tuple[str, str]] = set()
        self.vocabulary: dict[str, set[int]] = {}
        self._common = common
        self.module: str | None = None
        self._makers: dict[str, str | None] = {}

    def add(
        self,
        name: str,
        operands: list[Operand],
        base: Operand | None,
        cut: Cut,
        t: float,
        donors: Operand | None = None,
    ) -> list[TensorSpec]:
        """Add one output tensor.

        Args:
            name: of the output tensor.
            operands: the sources'.
            base: the base's.
            cut: the slice it is of.
            t: where in a gradient it stands, from 0 to 1.
            donors: that of a donor which is not merged and whose config describes the tensor.

        Returns:
            Its spec, or nothing if it is left out (and named).

        Raises:
            PlanError: it is made already, or the recipe contradicts itself.
        """
        if name in self._result.expressions:
            both = f"{self._makers.get(name)!r} and {self.module!r}"
            raise PlanError(
                f"two modules make {name!r}: {both}", remedy="name each part of the model in one module only"
            )
        self._makers[name] = self.module
        everyone = [*operands, *([base] if base is not None else [])]
        for operand in everyone:
            self.used.add((operand.model.key, operand.name))
        if self._is_buffer(name):
            return self._buffer(name, everyone, [o for o in everyone if not o.exists], base or operands[0])
        if not self._rules.merges(name):
            return self._unmerged(name, everyone, base, cut)
        if self._rules.missing == "merge" and any(operand.exists for operand in everyone):
            having = self._having(name, operands, base, cut)
            if having is None:
                return []
            operands, cut = having
            everyone = [*operands, *([base] if base is not None else [])]
            donors = donors if donors is not None and donors.exists else None
        described = [*everyone, *([donors] if donors is not None else [])]
        if not all(operand.exists for operand in described):
            source = self.partial.source_of(name, described, base)
            return [] if source is None else self._copy(name, source, [o for o in described if o.exists], cut)
        specs = [o.model.weights.specs[o.name] for o in everyone]
        if not all(spec.dtype.is_floating for spec in specs):
            return self._not_floating(name, everyone, specs, base or operands[0])
        shape = self._common_shape(name, everyone, specs)
        if shape is None or (donors is not None and not self._is_as_described(name, shape, everyone, donors)):
            return []
        inputs = [o.model.weights.expression(o.name, shape) for o in operands]
        base_input = None if base is None else base.model.weights.expression(base.name, shape)
        dtypes = [spec.dtype for spec in specs]
        spec = TensorSpec(name, self._arithmetic.stored or self._arithmetic.inputs or promote(dtypes), shape)
        expression = self._expression(spec, inputs, base_input, dtypes, cut, t)
        return self._store(spec, expression)

    def settle(self) -> None:
        """Conclude, once all tensors are added.

        Raises:
            PlanError: some cannot be merged with their parameters, or a pattern of the recipe matches none.
        """
        for (models, what, remedy), names in self.refused.items():
            more = "" if len(names) == 1 else f" and {len(names) - 1} more"
            raise PlanError(what, where=f"tensor {names[0]!r}{more} of {models}", remedy=remedy)
        self._rules.check([*self._result.expressions, *self._result.aliased])
        self._result.warnings += self.partial.warnings()

    def _is_buffer(self, name: str) -> bool:
        """See `is_buffer`; names say nothing where no config says what model they are of."""
        return not self._is_raw and is_buffer(name)

    def _having(
        self, name: str, operands: list[Operand], base: Operand | None, cut: Cut
    ) -> tuple[list[Operand], Cut] | None:
        """Those of the operands that exist, and the slice of their models; None, and a mismatch, if they are too few.

        Task vectors are differences from the base, so there are none of a tensor that it lacks.
        """
        places = [i for i, operand in enumerate(operands) if operand.exists]
        lacking = [*(o for o in operands if not o.exists), *([base] if base is not None and not base.exists else [])]
        if not lacking:
            return operands, cut
        having = [operands[i] for i in places]
        there = [*having, *([base] if base is not None and base not in lacking else [])]
        if base is not None and not base.exists:
            self.partial.refuse(name, there, lacking, f"{self._method.name} needs that of the base")
            return None
        if len(places) < self._method.min_models and (places or not self._method.adds_to_base()):
            self.partial.refuse(name, there, lacking, f"too few for {self._method.name}")
            return None
        self.partial.note_merged(name, there, lacking)
        part = replace(
            cut,
            sources=tuple(cut.sources[i] for i in places),
            first_layers=tuple(cut.first_layers[i] for i in places),
            source_parameters=tuple(cut.source_parameters[i] for i in places),
        )
        return having, part

    def _store(self, spec: TensorSpec, expression: Expression) -> list[TensorSpec]:
        """Note how a tensor is made; one of the vocabulary gets all its rows."""
        if self._common is not None and spec.name in self.vocabulary:
            spec, expression = self._common.completed(spec, expression)
            self.used.add((self._common.donor.key, self._common.name_in(spec.name)))
        self._result.expressions[spec.name] = expression
        return [spec]

    def _expression(
        self,
        spec: TensorSpec,
        inputs: list[Expression],
        base: Expression | None,
        dtypes: list[DType],
        cut: Cut,
        t: float,
    ) -> Expression:
        method = self._method
        if not inputs:
            assert base is not None  # to which nothing is added
            return base if base.spec.dtype is spec.dtype else Cast(base, spec.dtype)
        compute = self._arithmetic.compute or self._arithmetic.inputs or promote(dtypes)
        if method.name == "passthrough":
            scale = cut.source_parameters[0].at(spec.name, t)["scale"]
            if scale is not None and float(scale) != 1.0:
                return Scale(inputs[0], float(scale), spec.dtype, compute)
            return inputs[0] if inputs[0].spec.dtype is spec.dtype else Cast(inputs[0], spec.dtype)
        if self._arithmetic.compute is None and method.widens and compute.itemsize < DType.F32.itemsize:
            inputs = [x if x.spec.dtype is compute else Cast(x, compute) for x in inputs]
            compute = DType.F32
        seen: Counter[str] = Counter()
        keys = []
        for model in cut.sources:
            label = str(model.reference)
            seen[label] += 1
            keys.append(
                f"{self._arithmetic.seed}\n{spec.name}\n{label}" + (f"\n{seen[label]}" if seen[label] > 1 else "")
            )
        parameters = cut.parameters.at(spec.name, t)
        input_parameters = tuple(source.at(spec.name, t) for source in cut.source_parameters)
        try:
            method.check_together(parameters, input_parameters)
        except MergeError as error:
            models = ", ".join(str(model.reference) for model in cut.sources)
            self.refused.setdefault((models, error.what, error.remedy), []).append(spec.name)
        return Merge(
            method=method.name,
            spec=spec,
            inputs=tuple(inputs),
            base=base if method.base is not BaseUse.FORBIDDEN else None,
            parameters=parameters,
            input_parameters=input_parameters,
            keys=tuple(keys),
            compute_dtype=compute,
        )

    def _buffer(self, name: str, everyone: list[Operand], absent: list[Operand], donor: Operand) -> list[TensorSpec]:
        """A constant is copied from the donor, or left out if any model does without it."""
        reason = f"a constant that the model computes itself: that of {donor.model.reference} is copied"
        if absent:
            reason = "a constant that the model computes itself, and not all models store it"
        for operand in everyone:
            if operand not in absent and (absent or operand.model is not donor.model):
                self._result.dropped[operand.label] = reason
        return [] if absent else self._as_stored(name, donor)

    def _as_stored(self, name: str, operand: Operand) -> list[TensorSpec]:
        spec = operand.model.weights.specs[operand.name]
        self._result.expressions[name] = operand.model.weights.expression(operand.name)
        return [TensorSpec(name, spec.dtype, spec.shape)]

    def _copy(self, name: str, operand: Operand, having: list[Operand], cut: Cut) -> list[TensorSpec]:
        """Add one model's tensor, in the dtype of the output, where it is not merged with those that others have."""
        spec = operand.model.weights.specs[operand.name]
        self.used.add((operand.model.key, operand.name))
        donors = Operand(self._donor, name)
        is_described = donors.exists and operand.model is not self._donor and not self._is_recut(name, cut)
        if is_described and not self._is_as_described(name, spec.shape, [operand], donors):
            return []
        if self._is_buffer(name) or not spec.dtype.is_floating:
            return self._as_stored(name, operand)
        dtype = self._arithmetic.stored or self._arithmetic.inputs or spec.dtype
        x = operand.model.weights.expression(operand.name, self._copy_rows(name, operand, having))
        return self._store(TensorSpec(name, dtype, x.spec.shape), x if x.spec.dtype is dtype else Cast(x, dtype))

    def _unmerged(self, name: str, everyone: list[Operand], base: Operand | None, cut: Cut) -> list[TensorSpec]:
        """A tensor that the recipe keeps out of the merge comes from one model."""
        wanted = self._source or (base.model if base is not None else self._donor)
        source = next((operand for operand in everyone if operand.model is wanted), None)
        if source is None:
            is_recut = self._is_recut(name, cut)
            if is_recut and self._source is not None:
                raise PlanError(
                    f"{name!r} is to come from {wanted.reference}, which is not in the slice that makes it",
                    where="from",
                    remedy="list that model among the slice's sources, or remove `from`",
                )
            source = everyone[0] if is_recut else Operand(wanted, name)
        having = [operand for operand in everyone if operand.exists]
        if not source.exists:
            lacking = [*(o for o in everyone if not o.exists), source]
            found = self.partial.source_of(name, [*having, *lacking], source)
            return [] if found is None else self._copy(name, found, having, cut)
        for operand in having:
            if operand.model is not source.model:
                self._result.dropped[operand.label] = (
                    f"kept out of the merge: that of {source.model.reference} is copied"
                )
        return self._copy(name, source, having if source in having else [*having, source], cut)

    def _is_recut(self, name: str, cut: Cut) -> bool:
        """Whether a tensor is of the layers that slices put together anew: the donor's of that name is of another."""
        place = place_of(name)
        return place is not None and place.stack == self._donor.anatomy.main and not cut.is_all

    def _copy_rows(self, name: str, source: Operand, having: list[Operand]) -> tuple[int, ...] | None:
        """Shape of a copied tensor of the vocabulary: with as many rows as the merged ones have, if one is merged."""
        vocabulary = self._donor.anatomy.vocabulary
        if name not in vocabulary:
            having = [operand for operand in having if vocabulary_axis(operand) is not None]
            if source not in having:
                return None
        everyone = having if any(self._rules.merges(other) for other in vocabulary) else [source]
        return self._common_shape(name, everyone, [o.model.weights.specs[o.name] for o in everyone])

    def _not_floating(
        self, name: str, everyone: list[Operand], specs: list[TensorSpec], donor: Operand
    ) -> list[TensorSpec]:
        """Integers and booleans are no weights: the donor's are copied. Codes of weights never come this far."""
        if len({(spec.dtype, spec.shape) for spec in specs}) > 1:
            found = ", ".join(
                f"{o.model.reference}: {s.dtype.value} {list(s.shape)}" for o, s in zip(everyone, specs, strict=True)
            )
            self.mismatches.add(name, f"not a weight (not floating point), and not alike: {found}")
            return []
        for operand in everyone:
            if operand.model is not donor.model:
                self._result.dropped[operand.label] = f"not floating point: that of {donor.model.reference} is copied"
        return self._as_stored(name, donor)

    def _is_as_described(self, name: str, shape: tuple[int, ...], everyone: list[Operand], donors: Operand) -> bool:
        """Whether a tensor has the shape that the donor's config describes. `Vocabulary` sees to its own."""
        spec = donors.model.weights.specs[donors.name]
        if spec.shape == shape or donors.name in donors.model.anatomy.vocabulary or vocabulary_axis(donors) is not None:
            return True
        models = ", ".join(dict.fromkeys(str(operand.model.reference) for operand in everyone))
        described = f"{donors.model.reference}, whose config.json the output gets: {list(spec.shape)}"
        self.mismatches.add(name, f"different shapes ({models}: {list(shape)}, {described})")
        return False

    def _common_shape(self, name: str, everyone: list[Operand], specs: list[TensorSpec]) -> tuple[int, ...] | None:
        """The shape all share; for the vocabulary's tensors, the leading rows that all models have."""
        shapes = {spec.shape for spec in specs}
        axes = {vocabulary_axis(operand) for operand in everyone}
        axis = axes.pop() if len(axes) == 1 else None
        if axis == 1 or (axis == 0 and len({shape[1:] for shape in shapes}) == 1):
            rows = {shape[axis] for shape in shapes}
            self.vocabulary[name] = rows
            self._result.vocabulary |= {operand.model.key: operand.model for operand in everyone}
            common = min(rows) if self._common is None else self._common.common
            return (1, common) if axis else (common, *specs[0].shape[1:])
        if len(shapes) == 1:
            return specs[0].shape
        found = ", ".join(f"{o.model.reference}: {list(s.shape)}" for o, s in zip(everyone, specs, strict=True))
        self.mismatches.add(name, f"different shapes ({found})")
        return None
