"""What does not fit together, grouped: one line for what is wrong in every layer, not one for each."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergekit_ray.architectures.heads import classes_of
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.sizes import counted
from mergekit_ray.planning.lowering import Model

_MAX_LISTED = 12
_REMEDY = (
    "merge models of one architecture and shape, or leave out what differs: slices leave out layers, `exclude` keeps "
    "tensors out of the merge, and `missing` decides on tensors that only some models have (`base` copies them from "
    "base_model or the first model, `drop` leaves them out)"
)
_REMEDY_OF_RAW = (
    "merge files of one kind of model, or say what becomes of the rest: `tensors: intersection` leaves out what not "
    "all have, `tensors: union` merges a tensor from those that have it, and `exclude` copies tensors from one of them"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pattern_of(name: str) -> str:
    """A tensor's name with ``*`` for the numbers of layers and experts."""
    return _NUMBER.sub("*", name)


def classes_told(models: Iterable[Model]) -> str:
    """``: LlamaForCausalLM (/a, /b) against Qwen2ForCausalLM (/c)``; empty if the classes do not differ."""
    found: dict[str, list[str]] = {}
    for model in models:
        for name in classes_of(model.checkpoint.config)[:1]:
            found.setdefault(name, []).append(str(model.reference))
    told = " against ".join(f"{name} ({', '.join(dict.fromkeys(references))})" for name, references in found.items())
    return f": {told}" if len(found) > 1 else ""


class Groups:
    """Tensors grouped by the problem they share.

    A group of one is shown by its tensor's name, others by what their names share and their number.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add(self, name: str, what: str, prefix: str | None = None) -> None:
        """Put a tensor into a group.

        Args:
            name: of the output tensor.
            what: the problem, in words.
            prefix: a leading part of the name that stands for everything below it.
        """
        below = name if prefix is None or prefix == name else f"{prefix}.*"
        self._found.setdefault((pattern_of(below), what), []).append((name, below))

    def told(self) -> list[tuple[str, str, int]]:
        """Of each group: the name or pattern of its tensors, the problem, and how many they are."""
        lines = []
        for (pattern, what), tensors in self._found.items():
            shared = {below for _, below in tensors}
            common = f"{shared.pop() if len(shared) == 1 else pattern} ({counted(len(tensors), 'tensor')})"
            lines.append((tensors[0][0] if len(tensors) == 1 else common, what, len(tensors)))
        return lines


class Mismatches(Groups):
    """Collects what is wrong with single tensors and tells all of it at once.

    Args:
        models: that are merged.
    """

    def __init__(self, models: Iterable[Model]) -> None:
        super().__init__()
        self._models = tuple(models)

    def raise_if_any(self) -> None:
        """Tell what was found.

        Raises:
            ModelError: there is something.
        """
        lines = [f"{names}: {what}" for names, what, _ in self.told()]
        if not lines:
            return
        rest = len(lines) - _MAX_LISTED
        listed = "\n  ".join([*lines[:_MAX_LISTED], *([f"... and {rest} more"] if rest > 0 else [])])
        raise ModelError(
            f"the models do not fit together{classes_told(self._models)}:\n  {listed}",
            remedy=_REMEDY_OF_RAW if any(model.checkpoint.is_raw for model in self._models) else _REMEDY,
        )
