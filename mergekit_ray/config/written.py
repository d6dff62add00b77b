"""The text of a recipe's file, kept beside the recipe: comments, order and anchors are for its readers.

Neither equality nor the digest of a plan knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from mergekit_ray.config.fields import RecipeModel
from mergekit_ray.config.yaml_source import STAGES

_AT: Final = "_written"

_R = TypeVar("_R", bound=RecipeModel)


@dataclass(frozen=True, slots=True)
class Written:
    """A recipe as its author wrote it.

    Attributes:
        text: of its file.
        changes: in words, what the recipe says otherwise by now, such as ``seed: 7``.
        stage: the one of its stages that is meant; None for the last.
    """

    text: str
    changes: tuple[str, ...] = ()
    stage: str | None = None


def keep_text(recipe: RecipeModel, text: str, data: Mapping[str, Any], stage: str | None = None) -> None:
    """Note what a recipe was read from.

    Args:
        recipe: just read.
        text: of its file.
        data: the recipe's, as it was read.
        stage: see `Written`.
    """
    # Not a field: recipes are equal, and plans have one digest, whatever their comments.
    vars(recipe)[_AT] = (Written(text, stage=stage), data)


def written_by_author(recipe: RecipeModel, data: Mapping[str, Any]) -> Written | None:
    """What a recipe was read from; None if it was built in Python.

    Args:
        recipe: the recipe, which may have been changed since.
        data: the recipe's, as it is now.
    """
    if _AT not in vars(recipe):
        return None
    kept: Written = vars(recipe)[_AT][0]
    before: Mapping[str, Any] = vars(recipe)[_AT][1]
    return replace(kept, changes=tuple(_changes(before, data)))


def as_part(part: _R, whole: RecipeModel, data: Mapping[str, Any], stage: str | None) -> _R:
    """A copy of a stage of a recipe, or of some of its stages, that has the text of the whole."""
    copied = part.model_copy()
    if _AT in vars(whole):
        keep_text(copied, vars(whole)[_AT][0].text, data, stage)
    return copied


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if key == "output" or old == new:
            continue
        if key == STAGES and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for i, (one, other) in enumerate(zip(old, new, strict=True)):
                yield from _changes(one, other, f"{STAGES}[{i}].")
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{where}{key}.")
        elif key not in now:
            yield f"without {where}{key}"
        else:
            yield f"{where}{key}: {json.dumps(new, ensure_ascii=False)}"
