"""What is wrong with a recipe: findings, their wording, and their way into a ConfigError with lines."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_ray.config.yaml_source import Document, YamlPath, format_path
from mergekit_ray.core.errors import ConfigError, Problem
from mergekit_ray.core.spelling import closest

SETTINGS_ERROR = "recipe_settings"
"""Type of the pydantic error whose context lists what is wrong below one ``parameters``."""

FINDINGS_ERROR = "recipe_findings"
"""Type of the pydantic error whose context lists findings across fields, with paths below its own."""

_MISSING_HINTS = {
    "merge_method": "write for example `merge_method: linear`; `mergekit-ray methods` lists them all",
    "model": "write `model: org/name`, a folder, or s3://bucket/prefix",
    "source_model": "write `source_model: org/name`, a folder, or s3://bucket/prefix",
    "base_model": "write `base_model: org/name`: the model that gives everything but the experts' feed-forward layers",
    "layer_range": "write `layer_range: [0, 16]` for the first 16 layers; the end is not included",
    "sources": "a slice lists its `sources`, each with `model` and `layer_range`",
    "experts": "list `experts`, each with `source_model` and `positive_prompts`",
}

_MODEL_KEYS = ("model", "source_model", "base_model")
_MODEL_PARTS = {"revision": "@", "lora": "+"}
"""What people write beside a model's name though it is a part of it, with the sign before it there."""

_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}

_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong, or worth a warning.

    Attributes:
        path: where in the recipe.
        what: what was found and what is accepted.
        hint: the nearest accepted spelling or another remedy.
        is_unknown_key: mergekit would have ignored it; a warning where a recipe is read leniently.
        is_warning: never an error.
        depends: parts of the recipe it follows from. If one of them is wrong itself, the finding may only repeat that
            and is dropped. Empty means ``path``.
    """

    path: YamlPath
    what: str
    hint: str = ""
    is_unknown_key: bool = False
    is_warning: bool = False
    depends: tuple[YamlPath, ...] = ()

    def below(self, prefix: YamlPath) -> Finding:
        """The same finding in a recipe that stands inside another one."""
        depends = tuple(prefix + path for path in self.depends)
        return replace(self, path=prefix + self.path, depends=depends)


def found(value: object) -> str:
    """An unsuitable value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a number too large to print"
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """``did you mean 'x'?``, or nothing."""
    near = closest(word, accepted)
    return f"did you mean {near!r}?" if near else ""


def unknown_key(
    path: YamlPath, accepted: Collection[str], parameters: Collection[str] = (), value: object = None
) -> Finding:
    """The finding for a key that means nothing where it stands.

    Args:
        path: down to the key.
        accepted: the keys that would mean something.
        parameters: names of the method's parameters, which people forget to write under ``parameters``.
        value: what stands there.
    """
    key = str(path[-1])
    model = next((name for name in _MODEL_KEYS if name in accepted), None)
    if key in _MODEL_PARTS and model is not None:
        part = value if isinstance(value, str) else key.upper()
        hint = f"it is a part of the model's name: write `{model}: NAME{_MODEL_PARTS[key]}{part}`"
    else:
        hint = did_you_mean(key, accepted)
    if not hint and key == "merge_method":
        hint = "a merge has one method: write a document for each (after `---`), and stack what they make in the last"
    if not hint and key in parameters and "parameters" in accepted:
        hint = f"{key} is a parameter: write it under `parameters:`"
    what = f"unknown key {found(key)}; accepted: {', '.join(sorted(accepted))}"
    return Finding(path, what, hint, is_unknown_key=True)


def details_of(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic raised, without its echo of a wrong item as "too few items" of the list around it."""
    details = error.errors(include_url=False)
    return [detail for detail in details if detail["type"] != "too_short" or not detail["input"]]


def findings_of(
    details: Sequence[ErrorDetails], root: type[BaseModel], parameters: Collection[str] = ()
) -> list[Finding]:
    """Pydantic's errors in a recipe's own words.

    Args:
        details: from `details_of`.
        root: the model that was validated.
        parameters: names of the method's parameters.
    """
    findings: list[Finding] = []
    unknown = {d["loc"] for d in details if d["type"] == "extra_forbidden"}
    for detail in details:
        path = detail["loc"]
        if detail["type"] == "extra_forbidden":
            findings.append(unknown_key(path, accepted_keys(root, path), parameters, detail["input"]))
        elif detail["type"] == SETTINGS_ERROR:
            findings += [Finding((*path, *below), what, hint) for below, what, hint in detail["ctx"]["issues"]]
        elif detail["type"] == FINDINGS_ERROR:
            findings += [finding.below(path) for finding in detail["ctx"]["findings"]]
        elif detail["type"] == "missing":
            key = str(path[-1])
            siblings = [str(other[-1]) for other in unknown if other[:-1] == path[:-1]]
            if not any(closest(sibling, accepted_keys(root, path)) == key for sibling in siblings):
                findings.append(Finding(path, f"{key!r} is missing", _MISSING_HINTS.get(key, "")))
        else:
            findings.append(Finding(path, *_wording(detail)))
    return [_with_module_hint(finding) for finding in findings]


def _with_module_hint(finding: Finding) -> Finding:
    """Add that a module without layers needs no range."""
    if finding.path[:1] != ("modules",) or finding.path[-1] != "layer_range":
        return finding
    hint = "a module without layers (a projector) takes `models` in place of `slices`"
    return replace(finding, hint=f"{finding.hint}; {hint}" if finding.hint else hint)


def wanted(detail: ErrorDetails) -> str:
    """What pydantic says of a value, in our words where there are any: ``expected a number``."""
    kind = detail["type"]
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        limit = detail["ctx"][key]
        return f"expected {words} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}"
    return detail["msg"].removeprefix("Value error, ")


def _wording(detail: ErrorDetails) -> tuple[str, str]:
    value = detail["input"]
    kind = detail["type"]
    if kind in _EXPECTED or kind in _LIMITS:
        hint = ""
        if kind == "model_type" and isinstance(value, str) and detail["loc"][-2:-1] in (("models",), ("experts",)):
            hint = f"write `- {'model' if detail['loc'][-2] == 'models' else 'source_model'}: {value[:60]}`"
        elif kind == "model_type" and isinstance(value, str) and detail["loc"][-1:] == ("tokenizer",):
            hint = f"write `tokenizer: {{source: {value[:60]}}}`"
        elif kind == "string_type" and isinstance(value, bool | int | float):
            hint = "quote it"
        elif kind in ("list_type", "tuple_type") and isinstance(value, Mapping):
            hint = "begin each item with `- `"
        return f"{wanted(detail)}, found {found(value)}", hint
    if kind == "too_short":
        if isinstance(value, str):
            return "empty text", "write some, or remove it"
        return f"an empty {'mapping' if isinstance(value, Mapping) else 'list'}", "list at least one, or remove it"
    if kind == "literal_error":
        accepted = [word.strip("'") for word in re.split(", | or ", detail["ctx"]["expected"])]
        near = did_you_mean(value, accepted) if isinstance(value, str) else ""
        return f"accepted: {', '.join(accepted)}; found {found(value)}", near
    what, _, hint = wanted(detail).partition("\n")
    return what, hint


def accepted_keys(root: type[BaseModel], path: YamlPath) -> list[str]:
    """Keys of the model that holds the last key of ``path``."""
    current: Any = root
    for part in path[:-1]:
        current = _plain_type(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = _fields(current).get(str(part))
            if field is None:
                return []
            current = field.annotation
        else:
            arguments = [argument for argument in get_args(current) if argument is not Ellipsis]
            if not arguments:
                return []
            current = arguments[-1]
    current = _plain_type(current)
    return list(_fields(current)) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the names that recipes write them by."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _plain_type(annotation: Any) -> Any:
    """``X`` of ``Annotated[X | None, ...]``."""
    while (origin := get_origin(annotation)) in (Annotated, Union, types.UnionType):
        arguments = get_args(annotation)
        annotation = (
            next((a for a in arguments if a is not type(None)), None) if origin is not Annotated else arguments[0]
        )
    return annotation


def without_echoes_inside(findings: Iterable[Finding], damaged: Collection[YamlPath]) -> list[Finding]:
    """The findings that are not at or below a part of the recipe already found to be wrong."""
    wrong = set(damaged)
    return [finding for finding in findings if not any(part in wrong for part in _prefixes(finding.path))]


def _prefixes(path: YamlPath) -> Iterator[YamlPath]:
    return (path[:length] for length in range(len(path) + 1))


def without_echoes(findings: Iterable[Finding], damaged: Collection[YamlPath]) -> list[Finding]:
    """The findings that do not rest on a part of the recipe that is itself wrong."""
    wrong = set(damaged)
    around = {part for path in wrong for part in _prefixes(path)}

    def is_sound(finding: Finding) -> bool:
        subjects = finding.depends or (finding.path,)
        return not any(subject in around or not wrong.isdisjoint(_prefixes(subject)) for subject in subjects)

    return [finding for finding in findings if is_sound(finding)]


def to_problems(findings: Sequence[Finding], document: Document) -> list[Problem]:
    """Findings with their lines, in file order, each once."""
    keyed: dict[Problem, tuple[int, int]] = {}
    for finding in findings:
        position = document.position(finding.path)
        problem = Problem(document.where(position), format_path(finding.path), finding.what, finding.hint)
        keyed.setdefault(problem, position or (0, 0))
    for path, position, what, hint in document.problems:
        keyed.setdefault(Problem(document.where(position), format_path(path), what, hint), position)
    return sorted(keyed, key=lambda problem: keyed[problem])


def config_error(problems: Sequence[Problem], file: str) -> ConfigError:
    """One error for all problems of a recipe."""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{count} in the recipe", where=file or None, problems=problems)
