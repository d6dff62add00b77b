"""The anatomy of a checkpoint: its layer stacks, what comes before and after them, its embedding and its head.

Names of Hugging Face checkpoints are regular: ``<stack>.<layer>.<rest>`` for everything that repeats, anything else
stands outside. So the layers of a family we have never heard of are found by looking, not by a definition file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mergekit_ray.architectures.ties import unstored_copies
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.tensors import TensorSpec

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks", "layers")
"""Names under which ``config.json`` gives the number of layers of the main stack."""

_MODALITIES = (re.compile(r"vision|visual|image|(^|[._])vit([._]|$)"), re.compile(r"audio|speech"))

GROUP_COUNT_KEY = "num_hidden_groups"
"""Name of the number of layers that are stored where the model's layers share them (ALBERT)."""

_COUNT_KEYS_OF_PARTS = {
    "decoder": ("decoder_layers", "num_decoder_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers"),
}
"""Names of the same where a model has an encoder and a decoder, by the component of the stack's name."""

TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Sub-configs that describe the language model inside a multimodal one."""

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|tok_embeddings|token_embedding|embeddings?|shared)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|(lm_head\.|predictions\.|head\.|^)decoder|lm_head\.out_proj"
    r"|generator_lm_head|vocab_projector|output_projection|proj_out|lm_loss)\.(weight|bias)$"
)
_ALWAYS_HEAD = ("lm_head", "embed_out")
_UNTIED = frozenset({"bigbird_pegasus"})
"""Types of models whose class stores its head, whatever the config says of ties."""

_BEFORE = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|project_in|rotary_emb)(\.|$)")
_LAYER = re.compile(r"0|[1-9][0-9]{0,8}")
"""A layer's number, in its usual spelling. Longer numbers are taken for names."""

_MAX_GAP = 128
"""Layers without tensors between two that have some, or before the first: some files hold a part of a model."""

_MAX_LISTED = 8
"""Gaps in a message."""

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb|rotary_embs|rotary_pos_emb)\.(inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)(attention|attn|self_attention)\.(bias|masked_bias|rotary_emb\.inv_freq)$"
    r"|(^|\.)position_ids$"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in a stack: ``<stack>.<layer>.<rest>``."""

    stack: str
    layer: int
    rest: str

    @property
    def name(self) -> str:
        """The full tensor name."""
        return f"{self.stack}.{self.layer}.{self.rest}"


def place_of(name: str) -> Place | None:
    """The layer a name belongs to by its first numeric component (experts and such lie deeper), None if it has none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if 0 < i < len(parts) - 1 and _LAYER.fullmatch(part):
            return Place(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return None


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that models recompute (rotary frequencies, causal masks): copied, never merged."""
    return _BUFFER.search(name) is not None


@dataclass(frozen=True)
class Anatomy:
    """The parts of one checkpoint.

    Attributes:
        stacks: number of layers of each stack, by prefix.
        main: prefix of the stack that ``num_hidden_layers`` counts and ``slices`` cut; None if there are no layers.
        layers: per stack, per layer, the names below the layer (``self_attn.q_proj.weight``).
        before: names outside all stacks that come before the main one (embeddings), sorted.
        after: names outside all stacks that come after it (final norm, head), sorted.
        embedding: name of the input embedding.
        head: name of the output projection, if the checkpoint holds one.
        tied: whether the head's weight is the embedding's.
        vocabulary: names whose first dimension is the vocabulary.
        redundant: names in the file that a tied model ignores (a stored copy of the embedding as head).
        copies: names beside the head that a tied model leaves out, each with the stored tensor that it copies.
    """

    stacks: Mapping[str, int]
    main: str | None
    layers: Mapping[str, tuple[tuple[str, ...], ...]]
    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: str | None
    head: str | None
    tied: bool
    vocabulary: frozenset[str]
    redundant: frozenset[str] = field(default_factory=frozenset)
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the main stack."""
        return self.stacks[self.main] if self.main is not None else 0


def opaque(specs: Mapping[str, TensorSpec]) -> Anatomy:
    """The anatomy of tensors of which nothing is known but their names: no layers, no embedding, no head."""
    return Anatomy({}, None, {}, tuple(specs), (), embedding=None, head=None, tied=False, vocabulary=frozenset())


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: itself, or its ``text_config``, however deep."""
    if not any(key in config for key in LAYER_COUNT_KEYS):
        for key in TEXT_CONFIG_KEYS:
            inner = config.get(key)
            if isinstance(inner, Mapping):
                return language_config(inner)
    return config


def language_levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All parts of a config that speak of the language model, the outermost first.

    Some files say the same twice: at the top, and in a ``text_config``. A part that counts other layers than
    `language_config` is not one of them: it describes another stack.
    """
    count = configured_layers(config)
    return [level for level in _nested(config) if configured_layers(level) in (None, count)]


def _nested(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = (config.get(key) for key in TEXT_CONFIG_KEYS)
    return [config, *(level for part in inner if isinstance(part, Mapping) for level in _nested(part))]


def language_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a config says of its language model, on whatever level; where levels differ, as `language_config`."""
    view: dict[str, Any] = {}
    for level in (*language_levels(config), language_config(config)):
        view |= level
    return view


def stating(config: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The parts of a config that speak of the language model and have a key: where to change it, everywhere."""
    return [level for level in cast(list[dict[str, Any]], language_levels(config)) if key in level]


def configured_layers(config: Mapping[str, Any]) -> int | None:
    """The number of stored layers ``config.json`` states, None if it states none."""
    inner = language_config(config)
    for key in (GROUP_COUNT_KEY, *LAYER_COUNT_KEYS, *_COUNT_KEYS_OF_PARTS["decoder"]):
        if _is_count(inner.get(key)):
            return cast(int, inner[key])
    return None


def count_keys(part: Mapping[str, Any], stack: str | None, stacks: Iterable[str] = ()) -> list[str]:
    """The keys under which a part of a config gives the number of a stack's layers.

    Where a model has an encoder and a decoder, each has a key of its own, and ``num_hidden_layers`` may be another name
    of the encoder's. A decoder by itself keeps the encoder's key, and code may still take the number from it.

    Args:
        part: of a config.
        stack: the prefix of its layers.
        stacks: the prefixes of all stacks of the model.
    """
    components = {component for name in stacks for component in name.split(".")}
    own = [name for name in _COUNT_KEYS_OF_PARTS if name in (stack or "").split(".")]
    keys = [key for name in own for key in _COUNT_KEYS_OF_PARTS[name]]
    if not any(_is_count(part.get(key)) for key in keys):
        keys = [*LAYER_COUNT_KEYS]
    elif components and not components >= _COUNT_KEYS_OF_PARTS.keys():
        keys += [*LAYER_COUNT_KEYS, *(key for names in _COUNT_KEYS_OF_PARTS.values() for key in names)]
    elif own == ["encoder"]:
        counts = [part[key] for key in keys if _is_count(part.get(key))]
        keys += [key for key in LAYER_COUNT_KEYS if part.get(key) in counts]
    return [key for key in dict.fromkeys(keys) if _is_count(part.get(key))]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def anatomy(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Anatomy:
    """Read the parts of a checkpoint off its tensor names and config.

    Args:
        specs: all tensors of the checkpoint.
        config: its ``config.json``.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: layers are missing from the main stack, or numbers that cannot be right.
    """
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    outside: list[str] = []
    for name in specs:
        place = place_of(name)
        if place is None:
            outside.append(name)
        else:
            found[place.stack][place.layer].append(place.rest)
    expected = configured_layers(config)
    if expected is not None and expected < 0:
        raise CheckpointError(
            f"config.json says {expected} layers", where=where, remedy="correct num_hidden_layers in its config.json"
        )
    main = _main_stack(found, expected, specs)
    stacks: dict[str, int] = {}
    layers: dict[str, tuple[tuple[str, ...], ...]] = {}
    for stack, by_layer in found.items():
        num_layers = max(by_layer) + 1
        if stack == main and expected is not None:
            # Layers beyond the configured ones (multi-token prediction heads) are not part of the stack proper.
            extra = [i for i in by_layer if i >= expected]
            outside += [f"{stack}.{i}.{rest}" for i in extra for rest in by_layer[i]]
            num_layers = expected
        missing = _gaps(by_layer, num_layers)
        if missing and stack == main and expected is not None:
            raise CheckpointError(
                f"layers {_listed(missing)} of {stack!r} have no tensors; config.json says "
                + counted(expected, "layer"),
                where=where,
                remedy="download the checkpoint again, or correct num_hidden_layers in its config.json",
            )
        if widest := next((gap for gap in missing if gap.stop - gap.start > _MAX_GAP), None):
            raise CheckpointError(
                f"layers {_listed([widest])} of {stack!r} have no tensors, and layer {widest.stop} has",
                where=where,
                remedy="download the checkpoint again, or correct the numbers of its layers",
            )
        stacks[stack] = num_layers
        layers[stack] = tuple(tuple(sorted(by_layer.get(i, ()))) for i in range(num_layers))
    outside.sort()
    embedding = _embedding(outside, specs)
    heads = frozenset(n for n in outside if _is_head(n, specs, embedding))
    head = next((n for n in sorted(heads) if n.endswith(".weight")), None)
    flag = config.get("tie_word_embeddings", language_config(config).get("tie_word_embeddings"))
    if str(config.get("model_type")) in _UNTIED and head is not None:
        flag = False
    tied = embedding is not None and (bool(flag) if flag is not None else head is None)
    redundant = frozenset({head}) if tied and head is not None and flag else frozenset()
    return Anatomy(
        stacks=stacks,
        main=main,
        layers=layers,
        before=tuple(n for n in outside if _is_before(n, heads)),
        after=tuple(n for n in outside if not _is_before(n, heads)),
        embedding=embedding,
        head=None if redundant else head,
        tied=tied,
        vocabulary=heads | _copies(outside, specs, embedding),
        redundant=redundant,
        copies=unstored_copies(specs, embedding) if tied else {},
    )


def _main_stack(
    found: Mapping[str, Mapping[int, list[str]]], expected: int | None, specs: Mapping[str, TensorSpec]
) -> str | None:
    """The stack the config counts: of those as long as it says, or else of all, the one with the most parameters."""
    if not found:
        return None

    def num_elements(stack: str) -> int:
        return sum(
            specs[f"{stack}.{layer}.{rest}"].num_elements for layer, rests in found[stack].items() for rest in rests
        )

    fitting = [s for s, by_layer in found.items() if expected is None or max(by_layer) + 1 == expected]
    of_language = [s for s in fitting if modality_of(s) is None]
    return max(of_language or fitting or list(found), key=lambda s: (num_elements(s), s))


def modality_of(stack: str) -> re.Pattern[str] | None:
    """What finds the modality that a tower is for in its name, and in names of parts of configs; None of language."""
    return next((kind for kind in _MODALITIES if kind.search(stack.lower())), None)


def _embedding(outside: Iterable[str], specs: Mapping[str, TensorSpec]) -> str | None:
    """The largest vocabulary's; of several copies the one that all stacks share, then the outermost."""
    candidates = [n for n in outside if _EMBEDDING.search(n) and len(specs[n].shape) == 2]
    return max(
        candidates,
        key=lambda n: (specs[n].shape[0], n.endswith("shared.weight"), -n.count("."), n),
        default=None,
    )


def _copies(outside: Iterable[str], specs: Mapping[str, TensorSpec], embedding: str | None) -> frozenset[str]:
    """The embeddings: encoder-decoder models may store one for each side."""
    if embedding is None:
        return frozenset()
    shape = specs[embedding].shape
    return frozenset(n for n in outside if _EMBEDDING.search(n) and specs[n].shape == shape)


def _is_head(name: str, specs: Mapping[str, TensorSpec], embedding: str | None) -> bool:
    """Whether a tensor outside the layers is (part of) the output projection."""
    found = _HEAD.search(name)
    if found is None or place_of(name) is not None:
        return False
    # "output", "decoder" and similar names are also what projectors of other modalities call their last layer.
    shape = specs[name].shape
    is_alike = (
        embedding is not None
        and shape[:1] == specs[embedding].shape[:1]
        and len(shape) == (2 if name.endswith(".weight") else 1)
    )
    return found[2] in _ALWAYS_HEAD or is_alike


def _is_before(name: str, heads: frozenset[str]) -> bool:
    """Whether a tensor outside the layers is met before them. What stands beyond the configured layers comes after."""
    return _BEFORE.search(name) is not None and name not in heads and place_of(name) is None


def _gaps(numbers: Iterable[int], end: int) -> list[range]:
    """The runs of numbers below ``end`` that are not there, ascending."""
    gaps, start = [], 0
    for number in sorted(number for number in numbers if number < end):
        if start < number:
            gaps.append(range(start, number))
        start = number + 1
    return [*gaps, range(start, end)] if start < end else gaps


def _listed(gaps: list[range]) -> str:
    """``3, 7-9``, and how many more there are."""
    shown = [str(gap[0]) if gap[0] == gap[-1] else f"{gap[0]}-{gap[-1]}" for gap in gaps[:_MAX_LISTED]]
    return ", ".join(shown) + (f" and {len(gaps) - _MAX_LISTED} more" if len(gaps) > _MAX_LISTED else "")
