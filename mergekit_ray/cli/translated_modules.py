"""Modules that mergekit-extract-lora chooses by patterns, as the names that `extract-lora` takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mergekit_ray.checkpoint.models import open_models
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.planning.extraction import Coverage, extraction
from mergekit_ray.planning.make import models_of


def modules(
    tuned: str,
    base: str,
    *,
    saved: Sequence[str],
    excluded: Sequence[str],
    included: Sequence[str],
    embeddings: bool,
) -> tuple[list[str], list[str]]:
    """Which modules are stored whole, and which are left out, from the models' headers.

    mergekit stores whole what it does not factorise: norms, and without ``embeddings`` the embedding and the head.

    Args:
        tuned: the fine-tuned model.
        base: what it was tuned from.
        saved: ends of modules' names, to be stored whole, too.
        excluded: patterns; a module in whose name one is found is left out.
        included: patterns; if given, so is a module in whose name none is found.
        embeddings: factorise the embedding and the head.

    Returns:
        Their names, or ends of names that only they have.

    Raises:
        ConfigError: a pattern is none, or a model's name.
        MergekitRayError: a model cannot be read, or they have no matrix in common.
    """
    patterns = {text: _pattern(text) for text in (*excluded, *included)}
    try:
        references = ModelReference.parse(tuned), ModelReference.parse(base)
    except ValueError as error:
        raise ConfigError(str(error), remedy="name each model as in a recipe, such as org/name or a folder") from None
    opened = models_of(open_models(references))
    found = extraction(opened[references[0]], opened[references[1]], Coverage(embeddings=embeddings))
    factorised = {target.module for target in found.targets}
    others = {name.removesuffix(".weight") for name in found.uncovered if name.endswith(".weight")} - factorised

    def is_left_out(module: str) -> bool:
        return any(patterns[text].search(module) for text in excluded) or (
            bool(included) and not any(patterns[text].search(module) for text in included)
        )

    out = {module for module in factorised | others if is_left_out(module)}
    kept = (factorised | others) - out
    return [*dict.fromkeys([*saved, *_named(others - out, kept | out)])], _named(out & factorised, kept | out)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{text!r} is no regular expression: {error}", remedy="quote it in the shell") from None


def _named(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """The last parts of modules' names where all modules with that part are chosen, else the whole names."""
    wanted, by_part = set(chosen), defaultdict(set)
    for module in known:
        by_part[module.rpartition(".")[2]].add(module)
    names = {
        part if by_part[part] <= wanted else module for module in sorted(wanted) for part in [module.rpartition(".")[2]]
    }
    return sorted(names)
