"""What is wrong with a dense recipe in the light of its merge method's declaration."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from mergekit_ray.config.findings import Finding, did_you_mean, found
from mergekit_ray.config.normal import NormalSlice, NormalSource, normalise_for
from mergekit_ray.config.recipe import DenseRecipe, SliceRecipe, groups
from mergekit_ray.config.settings import (
    Conditional,
    Level,
    Resolver,
    Setting,
    check_gradient,
    coerce,
    gradients,
    is_set,
    scalars,
)
from mergekit_ray.config.yaml_source import YamlPath
from mergekit_ray.core.declaration import BaseUse, MethodDeclaration, Parameters
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.registry import Registry
from mergekit_ray.core.spelling import closest

IGNORED_PARAMETERS = {
    "int8_mask": "it saves mergekit memory and never changes the result",
    "dtype": "write it in the recipe, not below `parameters`",
    "out_dtype": "write it in the recipe, not below `parameters`",
    "random_seed": "write `seed` in the recipe, not below `parameters`",
    "seed": "write it in the recipe, not below `parameters`",
}
"""What recipes hold below ``parameters`` though no method reads it there, with what to say of it."""

_MAX_NAMED = 3


def method_findings(recipe: DenseRecipe, methods: Registry[type[MethodDeclaration]]) -> list[Finding]:
    """All that the recipe's method has to say about it.

    Args:
        recipe: one whose structure is sound.
        methods: where its method is found.
    """
    if recipe.merge_method not in methods:
        name = recipe.merge_method
        what = f"unknown merge method {found(name)}; accepted: {', '.join(methods.names())}"
        return [Finding(("merge_method",), what, did_you_mean(name, methods.names()))]
    try:
        method = methods.get(recipe.merge_method)
    except ConfigError as error:  # a method that cannot be loaded tells why
        return [Finding(("merge_method",), error.what, error.remedy or "")]
    misspelt: set[str] = set()
    findings = [*_parameters_findings(recipe, method, methods, misspelt)]
    findings += _ignored_bases(recipe, method)
    below = _levels_below(recipe)
    for module in normalise_for(recipe, method):
        for piece in module.slices:
            findings += _slice_findings(below.get(piece.path, ()), method, piece, misspelt)
    if any(not finding.is_warning for finding in findings):
        return findings
    for module in normalise_for(recipe, method):
        for piece in module.slices:
            findings += _clashes(method, piece)
    return findings


def _parameters_findings(
    recipe: DenseRecipe,
    method: type[MethodDeclaration],
    methods: Registry[type[MethodDeclaration]],
    misspelt: set[str],
) -> Iterator[Finding]:
    """Names and values of all parameters; adds to ``misspelt`` the names that were probably meant."""
    ignored: set[str] = set()
    scopes = method.parameter_names()
    for path, level in _levels(recipe):
        for name, setting in level.items():
            if name in scopes:
                yield from _parameter_findings(method, name, setting, (*path, name))
            elif (why := _why_ignored(name, methods)) is None:
                yield _unknown_parameter(method, name, (*path, name), misspelt)
            elif name not in ignored:
                ignored.add(name)
                what = f"{name} has no effect on {method.name}: {why}"
                yield Finding((*path, name), what, is_warning=True)


def _clashes(method: type[MethodDeclaration], piece: NormalSlice) -> Iterator[Finding]:
    """Constant parameters that are each fine, but not together; what gradients and filters give is seen at planning."""
    for source in piece.inputs:
        try:
            Resolver(method.model_parameters, source.levels)
        except ConfigError as error:
            yield Finding((*source.path, "parameters"), f"{source.model}: {error.what}", error.remedy or "")
    try:
        Resolver(method.global_parameters, piece.levels)
    except ConfigError as error:
        yield Finding(("parameters",), error.what, error.remedy or "")


def _levels(recipe: DenseRecipe) -> Iterator[tuple[YamlPath, Level]]:
    """Every ``parameters`` of the recipe with its path."""
    yield ("parameters",), recipe.parameters
    for name, module in (recipe.modules or {}).items():
        yield ("modules", name, "parameters"), module.parameters
    for path, _, group in groups(recipe):
        for index, piece in enumerate(group):
            yield (*path, index, "parameters"), piece.parameters
            if isinstance(piece, SliceRecipe):
                for i, source in enumerate(piece.sources):
                    yield (*path, index, "sources", i, "parameters"), source.parameters


def _levels_below(recipe: DenseRecipe) -> dict[YamlPath, list[tuple[YamlPath, Level]]]:
    """By the path of a slice, the ``parameters`` of its models (not its own). There may be thousands of slices."""
    found: dict[YamlPath, list[tuple[YamlPath, Level]]] = defaultdict(list)
    for path, level in _levels(recipe):
        for length in range(1, len(path) - 1):
            found[path[:length]].append((path, level))
    return found


def _why_ignored(name: str, methods: Registry[type[MethodDeclaration]]) -> str | None:
    """Why a parameter that a method does not have changes nothing; None if no method has one of that name."""
    if name in IGNORED_PARAMETERS:
        return IGNORED_PARAMETERS[name]
    having = []
    for other in methods.names():
        with contextlib.suppress(ConfigError):  # a method that cannot be loaded has none
            having += [other] if name in methods.get(other).parameter_names() else []
    if not having:
        return None
    named = ", ".join(having[:_MAX_NAMED]) + (", ..." if len(having) > _MAX_NAMED else "")
    return f"it is a parameter of {named}"


def _unknown_parameter(method: type[MethodDeclaration], name: str, path: YamlPath, misspelt: set[str]) -> Finding:
    """A parameter that no method has; adds to ``misspelt`` the name that was probably meant."""
    scopes = method.parameter_names()
    meant = closest(name, scopes)
    if meant is not None:
        misspelt.add(meant)
    accepted = ", ".join(sorted(scopes)) or "none"
    what = f"{method.name} has no parameter {found(name)}; accepted: {accepted}"
    return Finding(path, what, f"did you mean {meant!r}?" if meant else "remove it", is_unknown_key=True)


def _parameter_findings(method: type[MethodDeclaration], name: str, setting: Setting, path: YamlPath) -> list[Finding]:
    """A parameter's values."""
    declared = _declared(method, method.parameter_names()[name])
    findings: list[Finding] = []
    for below, value in scalars(setting):
        try:
            coerce(declared, name, value)
        except ValueError as error:
            findings.append(Finding((*path, *below), f"{error}, found {found(value)}"))
    if findings:
        return findings
    findings += _shadowed(setting, path)
    for gradient in gradients(setting):
        try:
            check_gradient(declared, name, gradient)
        except ValueError as error:
            return [Finding(path, f"{name} {error}", "write one value, or {filter, value} entries")]
    return findings


def _shadowed(setting: Setting, path: YamlPath) -> Iterator[Finding]:
    """Warnings of entries that never apply, as one before them takes all of their tensors."""
    cases = setting.cases if isinstance(setting, Conditional) else ()
    for i, case in enumerate(cases):
        first = next((each for each in cases[:i] if _covers(each.filter, case.filter)), None)
        if first is not None:
            entry = "an entry without `filter`" if first.filter is None else f"the filter {found(first.filter)}"
            what = f"this entry never applies: {entry} stands before it, and the first that matches counts"
            yield Finding((*path, i), what, "move it further up, or remove it", is_warning=True)


def _covers(wider: str | None, narrower: str | None) -> bool:
    """Whether every tensor of one filter is certainly one of another; None is all tensors."""
    if wider is None or wider == narrower:
        return True
    return narrower is not None and wider in narrower and not set("*?[") & set(wider) and "[" not in narrower


def _declared(method: type[MethodDeclaration], scope: str) -> type[Parameters]:
    return method.model_parameters if scope == "model" else method.global_parameters


def _ignored_bases(recipe: DenseRecipe, method: type[MethodDeclaration]) -> Iterator[Finding]:
    for path, _, group in groups(recipe):
        for index, piece in enumerate(group):
            if not isinstance(piece, SliceRecipe):
                continue
            if piece.base_model is not None and method.base is BaseUse.FORBIDDEN:
                what = f"base_model of a slice has no effect: {method.name} works without a base"
                yield Finding((*path, index, "base_model"), what, is_warning=True)
            if piece.residual_weight is not None:
                yield Finding((*path, index, "residual_weight"), "residual_weight has no effect", is_warning=True)


def _slice_findings(
    levels: Sequence[tuple[YamlPath, Level]], method: type[MethodDeclaration], piece: NormalSlice, misspelt: set[str]
) -> Iterator[Finding]:
    yield from _base_findings(method, piece)
    base_damage: tuple[YamlPath, ...] = (("base_model",), (*piece.path, "base_model"))
    outer: tuple[YamlPath, ...] = (("parameters",), (*piece.path, "parameters"), (*piece.path[:2], "parameters"))
    yield from _count_findings(method, piece, base_damage)
    for name, scope in method.parameter_names().items():
        field = next(
            info for key, info in _declared(method, scope).model_fields.items() if str(info.alias or key) == name
        )
        is_needed = field.is_required() and name not in misspelt
        if scope == "global":
            yield from _global_findings(levels, piece, name, is_needed=is_needed, method=method)
        elif is_needed:
            for source in piece.inputs:
                if not is_set(source.levels, name):
                    yield _missing(source, name, method, (source.path, *outer, *base_damage))


def _count_findings(
    method: type[MethodDeclaration], piece: NormalSlice, base_damage: tuple[YamlPath, ...]
) -> Iterator[Finding]:
    """Too few models, or too many."""
    if method.base_is_input and piece.base is None:
        return  # which of them is the base, decides how many are missing
    num_inputs = len(piece.inputs)
    beside = " beside the base model" if piece.base is not None else ""
    wanted = _wanted(method)
    if num_inputs == 0 and piece.base is not None and method.adds_to_base():
        what = f"{method.name} of no model beside the base model is the base model, {piece.base}"
        yield Finding(_listing(piece), what, "list the models to merge into it", is_warning=True)
    elif num_inputs < method.min_models:
        what = f"{method.name} takes {wanted}{beside}, found {num_inputs}"
        hint = "list more models"
        if piece.base is not None and method.base is BaseUse.OPTIONAL:
            hint += f", or remove `base_model` if {piece.base} is to be merged itself"
        yield Finding(_listing(piece), what, hint, depends=(piece.path, *base_damage))
    elif method.max_models is not None and num_inputs > method.max_models:
        what = f"{method.name} takes {wanted}{beside}, found {num_inputs}"
        if method.base_is_input and piece.base is not None and num_inputs == method.max_models + 1:
            names = " and ".join(str(source.model) for source in piece.inputs[:2])
            what = f"{method.name} merges the base model with one other; base_model {piece.base} is neither of {names}"
            hint = "make one of the two the base_model; mergekit refuses three models, too"
            if method.name == "slerp":
                hint += ". Or choose nuslerp, which interpolates the two models' changes to a third"
        else:
            hint = "remove models, or choose a method that takes more"
        yield Finding(_listing(piece), what, hint, depends=(piece.path, *base_damage))


def _missing(
    source: NormalSource, name: str, method: type[MethodDeclaration], depends: tuple[YamlPath, ...]
) -> Finding:
    what = f"{method.name} needs {name!r} for each model; {source.model} has none"
    hint = f"write `parameters: {{{name}: 0.5}}` beside the model, or {name} under the recipe's `parameters`"
    return Finding((*source.path, "parameters", name), what, hint, depends=depends)


def _global_findings(
    levels: Sequence[tuple[YamlPath, Level]],
    piece: NormalSlice,
    name: str,
    *,
    is_needed: bool,
    method: type[MethodDeclaration],
) -> Iterator[Finding]:
    """A parameter that a slice has once: not missing, and not set beside a model, where mergekit ignores it too."""
    inner = [path for path, level in levels if name in level]
    if is_needed and not is_set(piece.levels, name):
        hint = f"write `parameters: {{{name}: 0.5}}` in the recipe or the slice"
        depends = (("parameters",), piece.path, ("base_model",), ("modules",))
        what = f"{method.name} needs the parameter {name!r}"
        what += " once for all models, and does not take it from one" if inner else ""
        yield Finding((*(inner[0] if inner else ("parameters",)), name), what, hint, depends=depends)
        return
    for path in inner:
        what = f"{name} has no effect beside a model: {method.name} has one for all models"
        yield Finding((*path, name), what, "write it under the recipe's or the slice's `parameters`", is_warning=True)


def _base_findings(method: type[MethodDeclaration], piece: NormalSlice) -> Iterator[Finding]:
    if method.base is BaseUse.REQUIRED and piece.base is None:
        what = f"{method.name} needs a base model"
        hint = "write `base_model: org/name`"
        if method.base_is_input:
            hint += ", one of the two models"
        yield Finding(("base_model",), what, hint, depends=(("base_model",), (*piece.path, "base_model")))
    is_sliced = any(source.layer_range is not None for source in piece.inputs)
    if piece.base is not None and is_sliced and piece.base_layer_range is None:
        what = f"which layers of the base model {piece.base} belong here is unclear: the sources' layer ranges differ"
        hint = "list the base model among the sources, with its layer_range"
        yield Finding((*piece.path, "sources"), what, hint, depends=(piece.path, ("base_model",)))


def _listing(piece: NormalSlice) -> YamlPath:
    """The list whose length is wrong."""
    return piece.path if isinstance(piece.path[-1], str) else (*piece.path, "sources")


def _wanted(method: type[MethodDeclaration]) -> str:
    low, high = method.min_models, method.max_models
    if high is None:
        return f"at least {low} model{'s' if low != 1 else ''}"
    if low == high:
        return f"exactly {low} model{'s' if low != 1 else ''}"
    return f"{low} to {high} models"
