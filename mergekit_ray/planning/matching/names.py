"""One tensor under several names: what classes of models put around their parts is not part of them.

``model.layers.0…``, ``language_model.model.layers.0…`` and ``model.language_model.layers.0…`` are one layer: as a text
model has it, and as older and newer classes for several modalities wrap it. Which of them a file or an adapter has
depends on the class and the version of transformers that wrote it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from mergekit_ray.architectures.anatomy import place_of

WRAPPERS = frozenset(
    {
        *("model", "base_model", "language_model", "text_model", "llm", "thinker", "transformer", "module", "backbone"),
        *("bert", "roberta", "xlm_roberta", "distilbert", "electra", "albert", "deberta", "camembert", "gpt_neox"),
    }
)
"""Components of names by which classes of models hold a language model, or hold themselves."""

RENAMED = ((".mlp.", ".block_sparse_moe."),)
"""Parts of a layer that transformers calls by the first name, and files by the second (Mixtral, MiniMax)."""


def bare(name: str) -> str:
    """A tensor's name without wrappers; below the number of a layer, and for module and parameter, all is kept."""
    parts = name.split(".")
    place = place_of(name)
    outer = len(parts) - 2 if place is None else place.stack.count(".") + 1
    return ".".join([*(part for part in parts[:outer] if part not in WRAPPERS), *parts[max(0, outer) :]])


class Names:
    """The names of a model's tensors, to be found by what they are called elsewhere."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_bare: Mapping[str, list[str]] | None = None

    def find(self, name: str) -> list[str]:
        """Names of the tensor: the same one, or all that differ by wrappers or by `RENAMED`, or by their first part."""
        if name in self._names:
            return [name]
        if self._by_bare is None:
            by_bare = defaultdict(list)
            for known in sorted(self._names):
                by_bare[bare(known)].append(known)
            self._by_bare = dict(by_bare)
        if found := self._by_bare.get(bare(name)):
            return found
        for ours, theirs in RENAMED:
            if ours in name and (found := self._by_bare.get(bare(name.replace(ours, theirs)))):
                return found
        shorter = name.partition(".")[2]
        if shorter in self._names:
            return [shorter]
        return sorted({f"{known.partition('.')[0]}.{name}" for known in self._names} & self._names)
