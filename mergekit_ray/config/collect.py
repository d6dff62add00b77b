"""Validation that goes on after the first error.

If a value is wrong, pydantic skips the checks across values and the merge method's own, and users would correct a
recipe one error at a time. So we note each wrong value, remove it (or replace it by a stand-in if it is required), and
validate the rest again. The recipe that results is never returned: it only serves to find more errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mergekit_ray.config.fields import COLLECTING, RecipeModel
from mergekit_ray.config.findings import (
    SETTINGS_ERROR,
    Finding,
    accepted_keys,
    details_of,
    findings_of,
    without_echoes_inside,
)
from mergekit_ray.config.yaml_source import MAX_DEPTH, MAX_NODES, YamlPath
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.spelling import closest

_MAX_ROUNDS = 12
_STAND_INS: Mapping[str, Any] = {
    "model": "stand-in",
    "source_model": "stand-in",
    "base_model": "stand-in",
    "layer_range": [0, 1],
    "sources": [{"model": "stand-in", "layer_range": [0, 1]}],
    "experts": [{"source_model": "stand-in"}],
    "merge_method": "stand-in",
}


@dataclass
class Collected:
    """A recipe and what was wrong with its data.

    Attributes:
        recipe: validated; made of stand-ins where ``damaged`` is not empty; None if the data is beyond that.
        findings: what pydantic found.
        damaged: parts that were taken out or replaced.
    """

    recipe: RecipeModel | None
    findings: list[Finding] = field(default_factory=list)
    damaged: list[YamlPath] = field(default_factory=list)


def collect(root: type[RecipeModel], data: dict[str, Any], parameters: Collection[str], *, lenient: bool) -> Collected:
    """Validate ``data`` as far as it goes.

    Args:
        root: the recipe's model.
        data: plain data; left as it is, but for unknown keys, which are removed if ``lenient``.
        parameters: names of the method's parameters, for hints.
        lenient: unknown keys are not errors, so what they might have meant is really missing.
    """
    working = copy.deepcopy(data)
    result = Collected(None)
    for _ in range(_MAX_ROUNDS):
        try:
            result.recipe = root.model_validate(working, context=COLLECTING)
        except ValidationError as error:
            details = details_of(error)
            unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
            new = findings_of(details, root, parameters)
            if lenient and unknown:
                result.findings += [finding for finding in new if finding.is_unknown_key]
                for path in unknown:
                    delete_at(data, path)
                    delete_at(working, path)
                continue
            result.findings += without_echoes_inside(new, result.damaged)
            result.damaged += [path for path in map(_meant(root, working), unknown) if path is not None]
            repaired = [_repair(working, detail, result.damaged) for detail in details]
            if not all(repaired):
                break
        else:
            break
    if not (result.findings or result.recipe):  # held by construction: every round that repairs also finds
        raise ConfigError("the recipe cannot be validated", remedy="simplify it and report this as a bug")
    return result


def _meant(root: type[RecipeModel], data: Any) -> Callable[[YamlPath], YamlPath | None]:
    """For an unknown key, the key that was probably meant; None if there is none, or it is given as well."""

    def meant(path: YamlPath) -> YamlPath | None:
        near = closest(str(path[-1]), accepted_keys(root, path))
        return None if near is None or near in _at(data, path[:-1]) else (*path[:-1], near)

    return meant


def _repair(data: Any, detail: ErrorDetails, damaged: list[YamlPath]) -> bool:
    """Take out what ``detail`` complains of; False if that is not possible."""
    path = detail["loc"]
    if detail["type"] == "extra_forbidden":
        return delete_at(data, path)
    if detail["type"] == SETTINGS_ERROR:
        names = {str(below[0]) for below, _, _ in detail["ctx"]["issues"]}
        damaged += [(*path, name) for name in names]
        deleted = [delete_at(data, (*path, name)) for name in names]
        return all(deleted)
    if not path:
        return False
    damaged.append(path)
    if detail["type"] == "missing":
        holder = _at(data, path[:-1])
        if not isinstance(holder, dict) or path[-1] not in _STAND_INS:
            return False
        holder[path[-1]] = copy.deepcopy(_STAND_INS[str(path[-1])])
        return True
    holder = _at(data, path[:-1])
    if isinstance(holder, list) or path[-2:-1] in (("modules",), ("tokens",)):
        # An entry of a list keeps its place, so that the paths of its neighbours stay true.
        if holder is None or holder[path[-1]] == {}:
            return False
        holder[path[-1]] = {}
        return True
    return delete_at(data, path)


def _at(data: Any, path: YamlPath) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def delete_at(data: Any, path: YamlPath) -> bool:
    """Remove the key at the end of ``path``; False if there is none."""
    holder = _at(data, path[:-1])
    if not isinstance(holder, dict) or path[-1] not in holder:
        return False
    del holder[path[-1]]
    return True


def plain(source: Mapping[Any, Any]) -> dict[str, Any]:
    """A deep copy in dicts and lists, which can be edited; scalars and objects of other types stay as they are.

    Raises:
        ConfigError: a key that is not text, or a structure that no recipe has (one that holds itself).
    """
    budget = [MAX_NODES]
    copied = _plain(source, 0, budget)
    assert isinstance(copied, dict)
    return copied


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise ConfigError(
            f"the recipe is nested more than {MAX_DEPTH} deep or has more than {MAX_NODES} values, which no recipe has",
            remedy="check whether a part of it contains itself",
        )
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r:.60} is not text", remedy="keys of a recipe are strings")
        return {key: _plain(item, depth + 1, budget) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1, budget) for item in value]
    return value
