"""Whether the models of a Mixture of Experts fit together: told all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mergekit_ray.architectures.moe.family import OUTSIDE, STACK
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lowering import Model

_MAX_LISTED = 12
_SAME_CONFIG = ("model_type", "hidden_act")
"""What must be alike for one model's feed-forward layers to stand in another. Silence is no difference."""


def check_sources(
    base: Model, sources: Sequence[Model], feed_forward: Collection[str], copied: Collection[str] = ()
) -> None:
    """See that every expert's feed-forward layers fit into the base model.

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
    if not problems:
        return
    rest = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    raise ModelError(
        "the experts do not fit the base model:\n  " + "\n  ".join([*problems[:_MAX_LISTED], *rest]),
        where=f"base_model {base.reference}",
        remedy="take models of one family and size, best of all fine-tunes of one model",
    )


def vocabulary_warnings(base: Model, sources: Sequence[Model]) -> list[str]:
    """Say where an expert has another vocabulary: its embeddings are not used, so it is no error."""
    rows, found = _vocabulary(base), []
    for source in sources:
        theirs = _vocabulary(source)
        if theirs != rows:
            found.append(
                f"{source.reference} has a vocabulary of {theirs} tokens, {base.reference} one of {rows}: "
                f"embeddings and tokenizer are those of {base.reference}, and tokens that only the other knows are lost"
            )
    return found


def check_backbone(base: Model, expected: Sequence[str], made: Mapping[str, TensorSpec]) -> None:
    """See that a backbone recipe makes what stands outside the feed-forward layers, and nothing else.

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
    theirs, ours = source.checkpoint.config, base.checkpoint.config
    problems = [
        f"{key}: {ours[key]!r} in {base.reference}, {theirs[key]!r} in {source.reference}"
        for key in _SAME_CONFIG
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]
    depth = source.anatomy.stacks.get(STACK, 0)
    if depth != base.anatomy.num_layers:
        problems.append(f"layers: {base.anatomy.num_layers} in {base.reference}, {depth} in {source.reference}")
    folders = {name.split(".")[0] for name in feed_forward}
    extra = {rest for rests in source.anatomy.layers.get(STACK, ()) for rest in rests if rest.split(".")[0] in folders}
    problems += [
        f"{name}: not in {base.reference}, but in {source.reference}" for name in sorted(extra - set(feed_forward))
    ]
    for name in sorted(feed_forward):
        problems += _shapes(base, source, name)
    return problems


def _shapes(base: Model, source: Model, name: str) -> list[str]:
    """The first layer in which a tensor is missing or of another shape, and in how many that is so."""
    differing = []
    for layer in range(min(base.anatomy.num_layers, source.anatomy.stacks.get(STACK, 0))):
        full = f"{STACK}.{layer}.{name}"
        ours, theirs = base.weights.specs.get(full), source.weights.specs.get(full)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            differing.append((full, ours, theirs))
    if not differing:
        return []
    full, ours, theirs = differing[0]
    more = f" (and in {len(differing) - 1} more layers)" if len(differing) > 1 else ""
    return [f"{full}: {_shape(ours)} in {base.reference}, {_shape(theirs)} in {source.reference}{more}"]


def _not_floating(model: Model, name: str) -> list[str]:
    """The first layer in which a tensor is no weight."""
    for layer in range(model.anatomy.stacks.get(STACK, 0)):
        spec = model.weights.specs.get(f"{STACK}.{layer}.{name}")
        if spec is not None and (problem := _no_float(model, spec)):
            return [problem]
    return []


def _no_float(model: Model, spec: TensorSpec) -> str:
    if spec.dtype.is_floating:
        return ""
    return f"{spec.name}: stored as {spec.dtype.value} in {model.reference}, which is no floating dtype"


def _shape(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else str(list(spec.shape))


def _vocabulary(model: Model) -> int | None:
    embedding = model.anatomy.embedding
    return None if embedding is None else model.weights.specs[embedding].shape[0]
