"""Routers of a Mixture of Experts from prompts: for each layer, the vector that each expert is chosen by.

A token's score for an expert is the dot product of its hidden state with the expert's vector, so the vector is made to
point where the states of the expert's prompts are: ``v = unit(mean over positive prompts − mean over negative ones)``,
of the base model's states entering the layer. The base model is read layer by layer and never held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.moe_recipe import ExpertRecipe, GateMode, MoeRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.routing.batches import Batch, Tokens, depends_on_batch_length, make_batches
from mergekit_ray.routing.embeddings import as_numbers, embedding_rows
from mergekit_ray.routing.prompts import tokenize
from mergekit_ray.routing.spread import Here, Spread

LARGEST_CONDITION: Final = 5.0
"""Condition number of a layer's stacked unit vectors above which they are called near-identical."""

_CLOSE_COSINE: Final = (LARGEST_CONDITION**2 - 1) / (LARGEST_CONDITION**2 + 1)
"""Two unit vectors alone have condition number √((1+c)/(1−c)); beyond this cosine c it is above the largest."""

_MAX_NAMED: Final = 5

_Vectors = dict[int, np.ndarray]


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of all layers.

    Attributes:
        vectors: by layer, float32 [num_experts, hidden]; each row of length 1, or zero where ``warnings`` says so.
        shared: by layer, float32 [1, hidden] for the shared expert; empty if there is none or it has no prompts.
        lengths: by layer, the length that new rows are to have beside existing rows; empty if none are.
        warnings: what the user should know, in words.
    """

    vectors: Mapping[int, np.ndarray]
    shared: Mapping[int, np.ndarray] = field(default_factory=dict)
    lengths: Mapping[int, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def routers(
    recipe: MoeRecipe,
    checkpoints: Mapping[ModelReference, Checkpoint],
    *,
    spread: Spread | None = None,
) -> Routers:
    """Routers of the experts and of the shared expert, in one pass over the base model.

    Args:
        recipe: with a ``gate_mode`` that needs prompts. ``hidden`` and ``hidden_last`` take the state at each prompt's
            last token, ``hidden_avg`` the mean over its tokens; ``cheap_embed`` takes, for every layer alike, the unit
            vector of the sum of input embeddings of all tokens of all prompts.
        checkpoints: at least the base model.
        spread: where layers compute, in float32; None for this process's CPU. Into how many parts it splits the prompts
            changes nothing.

    Raises:
        ValueError: the recipe's routers are random.
        PlanError: transformers is not installed, an expert has no prompts, or the base model has an adapter.
        ModelError: the base model has no usable tokenizer or embeddings, or transformers cannot compute its states
            (see `routing.skeleton.build_skeleton`).
        MergeError: a hidden state is not finite.
        CheckpointError, StorageError: the base model could not be read.
    """
    groups = _groups(recipe)
    made = _vectors(recipe, groups, checkpoints, spread or Here())
    num_experts = len(recipe.experts)
    vectors = {layer: rows[:num_experts] for layer, rows in made.items()}
    return Routers(
        vectors,
        {layer: rows[num_experts:] for layer, rows in made.items()} if len(groups) > num_experts else {},
        warnings=[*_zero_warnings(made, list(groups)), *overlap_warnings(vectors)],
    )


def check_routable(recipe: MoeRecipe, checkpoints: Mapping[ModelReference, Checkpoint]) -> None:
    """Check that routers can be made, from headers, configs and the tokenizer alone.

    Args:
        recipe: where its routers are random, there is nothing to see.
        checkpoints: at least the base model.

    Raises:
        PlanError, ModelError, CheckpointError, StorageError: they cannot, as `routers` would say.
    """
    if not recipe.gate_mode.needs_prompts:
        return
    _, tokens = _asked(recipe, _groups(recipe), checkpoints)
    if recipe.gate_mode.needs_states:
        from mergekit_ray.routing import layers, layouts, skeleton  # noqa: PLC0415 - torch is slow to import

        checkpoint = layouts.as_transformers_has_it(checkpoints[recipe.base_model])
        layers.check_lengths(checkpoint, skeleton.build_skeleton(checkpoint), make_batches(tokens))


def _groups(recipe: MoeRecipe) -> dict[str, ExpertRecipe]:
    """What gets a vector, by its path in the recipe: the experts, then shared ones with prompts."""
    shared = [expert for expert in recipe.shared_experts or () if expert.positive_prompts]
    groups = {f"experts[{i}]": expert for i, expert in enumerate(recipe.experts)}
    return groups | {f"shared_experts[{i}]": expert for i, expert in enumerate(shared)}


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The prompts of one vector, as indices among all."""

    positive: list[int]
    negative: list[int]


def _vectors(
    recipe: MoeRecipe,
    groups: Mapping[str, ExpertRecipe],
    checkpoints: Mapping[ModelReference, Checkpoint],
    spread: Spread,
) -> _Vectors:
    """By layer, a unit vector for each group of prompts: float32 [num_groups, hidden]."""
    wanted, tokens = _asked(recipe, groups, checkpoints)
    checkpoint, mode = checkpoints[recipe.base_model], recipe.gate_mode
    if mode is GateMode.CHEAP_EMBED:
        return _embedded(checkpoint, tokens, wanted)
    batches = make_batches(tokens, equal_lengths=depends_on_batch_length(checkpoint.config))
    # Batches are sorted by length; dealing them out like cards makes parts of about equal length.
    num_parts = min(spread.num_parts, len(batches))
    parts = [batches[number::num_parts] for number in range(num_parts)]
    states = spread.states(checkpoint, parts, average=mode is GateMode.HIDDEN_AVG)
    return _combine(parts, states, wanted)


def _asked(
    recipe: MoeRecipe, groups: Mapping[str, ExpertRecipe], checkpoints: Mapping[ModelReference, Checkpoint]
) -> tuple[list[_Wanted], list[Tokens]]:
    """The prompts of each group, and the tokens of all prompts."""
    mode = recipe.gate_mode
    if not mode.needs_prompts:
        raise ValueError(f"gate_mode {mode.value!r} makes no router from prompts")
    for path, expert in groups.items():
        if not expert.positive_prompts:
            raise PlanError(
                f"gate_mode {mode.value!r} makes the router from prompts, and there are none",
                where=f"{path}.positive_prompts",
                remedy="list positive_prompts, or choose `gate_mode: random`",
            )
    if recipe.base_model.lora is not None:
        raise PlanError(
            "routers cannot be made from the states of a model with an adapter",
            where=str(recipe.base_model),
            remedy="merge the adapter into its model first, or name the model without it as base_model",
        )
    index: dict[str, int] = {}
    wanted = [
        _Wanted(
            [index.setdefault(prompt, len(index)) for prompt in expert.positive_prompts],
            [index.setdefault(prompt, len(index)) for prompt in expert.negative_prompts],
        )
        for expert in groups.values()
    ]
    return wanted, tokenize(checkpoints[recipe.base_model], list(index))


def _combine(parts: Sequence[Sequence[Batch]], states: Sequence[np.ndarray], wanted: Sequence[_Wanted]) -> _Vectors:
    """From states in the order of the batches to vectors."""
    order = [prompt for part in parts for batch in part for prompt in batch.indices]
    column = {prompt: position for position, prompt in enumerate(order)}
    vectors: _Vectors = {}
    for layer, of_parts in enumerate(zip(*states, strict=True)):
        rows = np.concatenate(of_parts).astype(np.float64)
        rows = np.concatenate([rows, np.zeros_like(rows[:1])])  # the state of a prompt without tokens
        made = []
        for group in wanted:
            direction = rows[[column.get(prompt, -1) for prompt in group.positive]].mean(0)
            if group.negative:
                direction = direction - rows[[column.get(prompt, -1) for prompt in group.negative]].mean(0)
            made.append(_unit(direction))
        vectors[layer] = np.stack(made).astype(np.float32)
    return vectors


def _embedded(checkpoint: Checkpoint, tokens: Sequence[Tokens], wanted: Sequence[_Wanted]) -> _Vectors:
    """Vectors from input embeddings, the same in every layer."""
    specs = {name: spec for name, (spec, _) in checkpoint.tensors.items()}
    parts = anatomy(specs, checkpoint.config, checkpoint.reference)
    if parts.embedding is None:
        raise ModelError(
            "no tensor's name says that it is the input embeddings",
            where=checkpoint.reference,
            remedy="choose another gate_mode",
        )
    known = sorted({token for prompt in tokens for token in prompt})
    dtype = specs[parts.embedding].dtype
    if not dtype.is_floating:
        raise ModelError(
            f"the input embeddings are stored as {dtype.config_name}, of which no router can be made",
            where=checkpoint.reference,
            remedy="name a model in bfloat16, float16 or float32 as base_model, or choose another gate_mode",
        )
    rows = as_numbers(embedding_rows(checkpoint, parts.embedding, known), dtype)
    row_of = {token: row for row, token in enumerate(known)}

    def direction(prompts: Sequence[int]) -> np.ndarray:
        return _unit(rows[[row_of[token] for prompt in prompts for token in tokens[prompt]]].sum(0))

    made = []
    for group in wanted:
        vector = direction(group.positive)
        made.append(_unit(vector - direction(group.negative)) if group.negative else vector)
    same = np.stack(made).astype(np.float32)
    return dict.fromkeys(range(parts.num_layers), same)


def _unit(direction: np.ndarray) -> np.ndarray:
    """A float64 vector at length 1; a zero vector as it is."""
    length = np.linalg.norm(direction)
    unit: np.ndarray = direction / length if length > 0 else direction
    return unit


def _zero_warnings(vectors: Mapping[int, np.ndarray], names: Sequence[str]) -> list[str]:
    warnings = []
    for position, name in enumerate(names):
        layers = [layer for layer, rows in vectors.items() if not rows[position].any()]
        if layers:
            warnings.append(
                f"{name}: its positive and negative prompts cancel in {in_words(layers)}, where its router is zero "
                "(a prompt's last token is all that the first layer sees of it)"
                if layers == [0]
                else f"{name}: its positive and negative prompts cancel in {in_words(layers)}, where its router is zero"
            )
    return warnings


def overlap_warnings(vectors: Mapping[int, np.ndarray]) -> list[str]:
    """What to say about layers whose experts the router can hardly tell apart.

    Args:
        vectors: by layer, [num_experts, hidden] of unit (or zero) rows.

    Returns:
        A sentence for each set of expert pairs that are too close, naming them and the layers: those with a condition
        number of the stacked rows above `LARGEST_CONDITION`. Zero rows are left out.
    """
    found: dict[tuple[tuple[int, int], ...], dict[int, float]] = {}
    for layer, rows in vectors.items():
        experts = np.flatnonzero(rows.any(axis=1))
        if len(experts) < 2:
            continue
        stacked = rows[experts].astype(np.float64)
        singular = np.linalg.svd(stacked, compute_uv=False)
        condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
        if condition > LARGEST_CONDITION:
            found.setdefault(_close_pairs(stacked, experts), {})[layer] = condition
    return [_overlap_warning(pairs, conditions) for pairs, conditions in found.items()]


def _close_pairs(stacked: np.ndarray, experts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Pairs whose cosine alone would explain the condition number; if there is none, the closest."""
    cosines = np.abs(stacked @ stacked.T)
    left, right = np.triu_indices(len(stacked), 1)
    close = cosines[left, right] > _CLOSE_COSINE
    if not close.any():
        close = cosines[left, right] == cosines[left, right].max()
    return tuple((int(experts[a]), int(experts[b])) for a, b in zip(left[close], right[close], strict=True))


def _overlap_warning(pairs: Sequence[tuple[int, int]], conditions: Mapping[int, float]) -> str:
    named = ", ".join(f"experts[{a}] and experts[{b}]" for a, b in pairs[:_MAX_NAMED])
    more = f" and {counted(len(pairs) - _MAX_NAMED, 'more pair')}" if len(pairs) > _MAX_NAMED else ""
    return (
        f"the routers of {in_words(list(conditions))} can hardly tell {named}{more} apart (condition number "
        f"{max(conditions.values()):.3g}, and above {LARGEST_CONDITION:g} is too close): give them prompts that differ "
        "more, negative prompts, or train the routers"
    )


def in_words(numbers: Sequence[int]) -> str:
    """Layers in words: ``layer 3``, ``layers 0-2, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer {listed}" if len(numbers) == 1 else f"layers {listed}"
