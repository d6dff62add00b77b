"""What does not fit together, grouped: one line for what is wrong in every layer, not one for each."""

from __future__ import annotations

import re

from mergekit_ray.core.errors import ModelError

_MAX_LISTED = 12
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pattern_of(name: str) -> str:
    """A tensor's name with ``*`` for the numbers of layers and experts."""
    return _NUMBER.sub("*", name)


class Groups:
    """Tensors of which the same is to be said, by what is to be said.

    A group is told by its tensor's name if it has one only, else by what their names share, and their number.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add(self, name: str, what: str, prefix: str | None = None) -> None:
        """Put a tensor into a group.

        Args:
            name: of the output tensor.
            what: is to be said.
            prefix: a leading part of the name that stands for everything below it.
        """
        below = name if prefix is None or prefix == name else f"{prefix}.*"
        self._found.setdefault((pattern_of(below), what), []).append((name, below))

    def told(self) -> list[tuple[str, str, int]]:
        """For each group what its tensors are called, what is to be said, and how many they are."""
        lines = []
        for (pattern, what), tensors in self._found.items():
            shared = {below for _, below in tensors}
            common = f"{shared.pop() if len(shared) == 1 else pattern} ({len(tensors)} tensors)"
            lines.append((tensors[0][0] if len(tensors) == 1 else common, what, len(tensors)))
        return lines


class Mismatches(Groups):
    """Collects what is wrong with single tensors and tells all of it at once."""

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
            f"the models do not fit together:\n  {listed}",
            remedy="merge models of one architecture and shape; leave out the layers that differ with slices; "
            "`missing: base` takes what only some models have from base_model or the first model, `missing: drop` "
            "leaves it out; `exclude` keeps tensors out of the merge",
        )
