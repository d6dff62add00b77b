"""Whether the models of a Mixture of Experts fit together: told all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mergekit_ray.architectures.anatomy import is_buffer, place_of
from mergekit_ray.architectures.moe.family import OUTSIDE, MoeFamily
from mergekit_ray.architectures.settings import ACTIVATION, MODEL_TYPE
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.agreement import differences
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.matching.mismatches import classes_told

_MAX_LISTED = 12


def check_sources(
    base: Model, sources: Sequence[Model], feed_forward: Collection[str], copied: Collection[str] = ()
) -> None:
    """Check that every expert's feed-forward layers fit into the base model.

    Args:
        base: gives all else.
        sources: models that experts are made of.
        feed_forward: names below a layer of a feed-forward layer's tensors.
        copied: the base's tensors that are taken as they are.

    Raises:
        ModelError: listing each mismatch with both values.
    """
    problems = [_no_float(base, base.weights.specs[name]) for name in copied]
    problems = [problem for problem in problems if problem]
    for source in sources:
        problems += _mismatches(base, source, feed_forward) if source is not base else []
        for name in sorted(feed_forward):
            problems += _not_floating(source, name)
    if problems:
        raise _misfit(base, sources, problems)


def check_additions(
    family: MoeFamily, base: Model, sources: Sequence[Model], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that dense models can give experts to a Mixture of Experts.

    Args:
        family: of the base model.
        base: the Mixture of Experts.
        sources: models that the new experts are made of.
        shapes: of each feed-forward tensor as a dense model names it, as the existing experts have it.

    Raises:
        ModelError: listing each mismatch with both values.
    """
    problems = [_no_float(base, spec) for spec in base.weights.specs.values() if not is_buffer(spec.name)]
    problems = [problem for problem in problems if problem]
    accepted = family.dense_types_of(str(base.checkpoint.config.get("model_type")))
    for source in sources:
        config = source.checkpoint.config
        if config.get("model_type") not in accepted:
            problems.append(
                f"model_type: {base.reference} takes experts from {' or '.join(accepted)}, and {source.reference} is "
                f"{config.get('model_type')!r}"
            )
            continue
        problems += differences([base, source], (ACTIVATION,))
        problems += _depths(base, source)
        problems += _wrong_shapes(base, source, shapes)
        problems += [problem for name in sorted(_rests(shapes)) for problem in _not_floating(source, name)]
    if problems:
        raise _misfit(base, sources, problems)


def _rests(shapes: Collection[str]) -> set[str]:
    return {place.rest for name in shapes if (place := place_of(name)) is not None}


def _wrong_shapes(base: Model, source: Model, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """For each feed-forward tensor of a layer, the first layer in which it is missing or of another shape."""
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        spec, place = source.weights.specs.get(name), place_of(name)
        assert place is not None
        if spec is None or spec.shape != shape:
            found.setdefault(
                place.rest,
                f"{name}: {list(shape)} in experts of {base.reference}, {_shape(spec)} in {source.reference}",
            )
    return list(found.values())


def _misfit(base: Model, sources: Sequence[Model], problems: Sequence[str]) -> ModelError:
    rest = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return ModelError(
        f"the experts do not fit the base model{classes_told([base, *sources])}:\n  "
        + "\n  ".join([*problems[:_MAX_LISTED], *rest]),
        where=f"base_model {base.reference}",
        remedy="use models of one family and size, ideally fine-tunes of one model",
    )


def vocabulary_warnings(base: Model, sources: Sequence[Model]) -> list[str]:
    """Say where an expert has another vocabulary: its embeddings are not used, so it is no error."""
    rows, found = _vocabulary(base), []
    for source in sources:
        theirs = _vocabulary(source)
        if theirs != rows:
            found.append(
                f"{source.reference} has a vocabulary of {theirs} tokens, {base.reference} one of {rows}: "
                f"the output has embeddings and tokenizer of {base.reference}, and loses tokens that only the other has"
            )
    return found


def check_backbone(base: Model, expected: Sequence[str], made: Mapping[str, TensorSpec]) -> None:
    """Check that a backbone recipe makes what stands outside the feed-forward layers, and nothing else.

    Args:
        base: the model whose place it takes.
        expected: the base's tensors outside its feed-forward layers.
        made: the backbone's.

    Raises:
        PlanError: listing tensors that it does not make, makes beside these, or makes in another shape.
    """
    needed = [name for name in expected if name not in OUTSIDE or name == base.anatomy.embedding]
    problems = [f"{name}: not made" for name in needed if name not in made]
    problems += [f"{name}: not in {base.reference}" for name in made if name not in expected and name not in OUTSIDE]
    for name, spec in made.items():
        shape = base.weights.specs[name].shape if name in base.weights.specs else None
        free = 1 if name in base.anatomy.vocabulary else 0
        if shape is not None and spec.shape[free:] != shape[free:]:
            problems.append(f"{name}: {list(spec.shape)}, but {list(shape)} in {base.reference}")
    if not problems:
        return
    rest = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    raise PlanError(
        "the backbone does not take the place of the base model:\n  " + "\n  ".join([*problems[:_MAX_LISTED], *rest]),
        where="backbone",
        remedy="merge whole models of the base model's shape in it, with as many layers as the base model has",
    )


def _mismatches(base: Model, source: Model, feed_forward: Collection[str]) -> list[str]:
    problems = differences([base, source], (MODEL_TYPE, ACTIVATION)) + _depths(base, source)
    stack = str(base.anatomy.main)
    folders = {name.split(".")[0] for name in feed_forward}
    extra = {rest for rests in source.anatomy.layers.get(stack, ()) for rest in rests if rest.split(".")[0] in folders}
    problems += [
        f"{name}: not in {base.reference}, but in {source.reference}" for name in sorted(extra - set(feed_forward))
    ]
    for name in sorted(feed_forward):
        problems += _shapes(base, source, name)
    return problems


def _depths(base: Model, source: Model) -> list[str]:
    depth = source.anatomy.stacks.get(str(base.anatomy.main), 0)
    if depth == base.anatomy.num_layers:
        return []
    return [f"layers: {base.anatomy.num_layers} in {base.reference}, {depth} in {source.reference}"]


def _shapes(base: Model, source: Model, name: str) -> list[str]:
    """The first layer in which a tensor is missing or of another shape, and in how many that is so."""
    differing, stack = [], str(base.anatomy.main)
    for layer in range(min(base.anatomy.num_layers, source.anatomy.stacks.get(stack, 0))):
        full = f"{stack}.{layer}.{name}"
        ours, theirs = base.weights.specs.get(full), source.weights.specs.get(full)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            differing.append((full, ours, theirs))
    if not differing:
        return []
    full, ours, theirs = differing[0]
    more = f" (and in {counted(len(differing) - 1, 'more layer')})" if len(differing) > 1 else ""
    return [f"{full}: {_shape(ours)} in {base.reference}, {_shape(theirs)} in {source.reference}{more}"]


def _not_floating(model: Model, name: str) -> list[str]:
    """The first layer in which a tensor is no weight."""
    for layer in range(model.anatomy.num_layers):
        spec = model.weights.specs.get(f"{model.anatomy.main}.{layer}.{name}")
        if spec is not None and (problem := _no_float(model, spec)):
            return [problem]
    return []


def _no_float(model: Model, spec: TensorSpec) -> str:
    if spec.dtype.is_floating:
        return ""
    return f"{spec.name}: stored as {spec.dtype.value} in {model.reference}, which is not floating point"


def _shape(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else str(list(spec.shape))


def _vocabulary(model: Model) -> int | None:
    embedding = model.anatomy.embedding
    return None if embedding is None else model.weights.specs[embedding].shape[0]
