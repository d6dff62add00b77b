"""Whose output occupies the place that another merge or an extraction wants to write to, by its manifest or its plan.

Anybody may have written these files, so everything unexpected in them is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from mergekit_ray.core.plan import Plan

_MAX_MODELS: Final = 4
_MAX_FILES: Final = 4
_MODEL_KEYS: Final = ("model", "source_model")


def occupant(found: Mapping[str, Any], *, is_finished: bool, plan: Plan | None = None) -> str | None:
    """What the place holds, by a manifest or by the note of an unfinished plan; None if it does not say.

    Args:
        found: has the recipe and the seed of a merge, or the models of an extraction.
        is_finished: it is a manifest.
        plan: what is to be written there instead; None for an adapter.
    """
    kind = "output" if is_finished else "unfinished output"
    if isinstance(found.get("finetuned"), str) and isinstance(found.get("base"), str):
        size = [f", {key} {found[key]}" for key in ("rank", "energy") if isinstance(found.get(key), int | float)]
        models = f"what {found['finetuned']} learnt beyond {found['base']}"
        return f"another extraction's adapter is there: {models}{''.join(size)}"
    recipe = found.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    if plan is not None and _without_seed(recipe) == _without_seed(json.loads(json.dumps(plan.recipe))):
        if found.get("seed") != plan.seed:
            return f"this recipe's {kind} with seed {found.get('seed')} is there, and the seed is {plan.seed} now"
        return f"this recipe's {kind} from other inputs, or by another version of mergekit-ray, is there"
    what = described(recipe)
    whose = "a merge's" if plan is None else "another recipe's"
    return None if what is None else f"{whose} {kind} is there: {what}"


def files_told(names: Sequence[str]) -> str:
    """Present files, where nothing says whose they are."""
    more = f" and {len(names) - _MAX_FILES} more" if len(names) > _MAX_FILES else ""
    return f"other files are there already: {', '.join(names[:_MAX_FILES])}{more}"


def described(recipe: Mapping[str, Any]) -> str | None:
    """A recipe in a few words, such as ``a ties merge of A and B onto BASE``; None if it is of no known kind."""
    base, method = recipe.get("base_model"), recipe.get("merge_method")
    models = [model for model in dict.fromkeys(_models(recipe)) if model != base]
    if "experts" in recipe:
        kind = "a Mixture of Experts"
    elif isinstance(method, str) and method:
        kind = f"{'an' if method[0] in 'aeiou' else 'a'} {method} merge"
    elif "transplant" in recipe:
        kind = "a transplant"
    elif "modules" in recipe:
        kind = "a merge of modules"
    elif "stages" in recipe:
        kind = "a merge in stages"
    else:
        return None
    if models:
        shown = models[:_MAX_MODELS] + ([f"{len(models) - _MAX_MODELS} more"] if len(models) > _MAX_MODELS else [])
        kind += " of " + " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
    return f"{kind} onto {base}" if isinstance(base, str) else kind


def _without_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "seed"}


def _models(data: Any) -> Iterator[str]:
    """The models that a recipe names, in its order, but for its base."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if key in _MODEL_KEYS and isinstance(value, str):
                yield value
            else:
                yield from _models(value)
    elif isinstance(data, list | tuple):
        for each in data:
            yield from _models(each)
