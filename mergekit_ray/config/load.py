"""`load_recipe`: a recipe from a file, a text or a mapping, with everything that is wrong with it said at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_ray.config.collect import Collected, collect, delete_at, plain
from mergekit_ray.config.fields import OutputOptions, RecipeModel
from mergekit_ray.config.findings import Finding, config_error, found, to_problems, without_echoes
from mergekit_ray.config.method_checks import method_findings
from mergekit_ray.config.moe_recipe import MOE_KEYS, MoeRecipe, moe_findings
from mergekit_ray.config.recipe import BODIES, MOE_METHOD, DenseRecipe, structure_findings
from mergekit_ray.config.reference import IGNORED_KEYS
from mergekit_ray.config.stages import Around, StagedRecipe, no_effect_of_precision, stage_findings
from mergekit_ray.config.written import keep_text
from mergekit_ray.config.yaml_source import MAX_TEXT_BYTES, STAGES, Document, YamlPath, read_yaml, too_large
from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.errors import ConfigError, Problem
from mergekit_ray.core.registry import METHODS, Registry
from mergekit_ray.core.spelling import nearest

Recipe: TypeAlias = DenseRecipe | MoeRecipe | StagedRecipe
Methods: TypeAlias = Registry[type[MethodDeclaration]]

_IGNORED_BESIDE_THE_METHOD = {
    **dict.fromkeys(("random_seed", "random-seed"), "write `seed` to choose the random masks"),
    **dict.fromkeys(
        (
            *("int8_mask", "embed_slerp", "cuda", "low_cpu_memory", "lazy_unpickle", "copy_tokenizer"),
            *("write_model_card", "safe_serialization", "read_to_gpu", "multithread", "num_threads"),
        ),
        "it does not change the result",
    ),
}
"""Keys that published recipes have at the top level, where mergekit ignores them, with what to say of each."""

_SUFFIXES = (".yml", ".yaml")
_OF_ENTRIES = ("models", "sources", "experts", "shared_experts")
_WHAT_TO_WRITE = (
    "a dense merge has `merge_method` and `models` (or `slices` or `modules`); "
    "a Mixture of Experts has `base_model` and `experts`"
)


class RecipeWarning(UserWarning):
    """Something in a recipe that has no effect."""


def load_recipe(
    source: Path | str | bytes | Mapping[str, Any] | Recipe,
    *,
    name: str = "<text>",
    lenient: bool = False,
    on_warning: Callable[[Problem], None] | None = None,
    methods: Methods = METHODS,
) -> Recipe:
    """Read a recipe: dense, a Mixture of Experts, or of several stages.

    Args:
        source: a path; a string, which is a path if it ends in ``.yml`` or ``.yaml`` or names a file, and YAML text if
            it has a line break or ``": "``; the content of a file, as bytes; a mapping such as ``yaml.safe_load``
            gives; or a recipe built in Python, which is checked against its merge method.
        name: what to call a text, or the content of a file, in messages.
        lenient: turn unknown keys and parameters into warnings: mergekit ignored them.
        on_warning: called with each thing that has no effect; `warnings.warn` with a `RecipeWarning` if None.
        methods: where merge methods are found.

    Returns:
        The recipe, sound as far as can be told without looking at a model.

    Raises:
        ConfigError: with all that is wrong as `ConfigError.problems`, in file order.
    """
    if isinstance(source, RecipeModel):
        return _tell(Collected(source), Document(None), _semantic(source, methods), on_warning)
    document = _document(source, name)
    read = _staged if isinstance(document.data, dict) and STAGES in document.data else _single
    collected = read(document.data, methods, lenient=lenient)
    findings = [_as_warning(f) if lenient and f.is_unknown_key else f for f in collected.findings]
    if isinstance(collected.recipe, DenseRecipe) and collected.recipe.keep_precision:
        findings.append(no_effect_of_precision())
    recipe = _tell(collected, document, findings, on_warning)
    if document.text is not None:
        keep_text(recipe, document.text, recipe.to_data())
    return recipe


def _single(data: Any, methods: Methods, *, lenient: bool) -> Collected:
    """A recipe of one merge, with all findings."""
    kind = _kind(data)
    if isinstance(kind, Finding):
        return Collected(None, [kind])
    ignored = [*_without_ignored(data), *_ignored_keys(data)]
    names = _parameter_names(data.get("merge_method"), methods)
    collected = collect(kind, data, names, lenient=lenient)
    findings = [*collected.findings, *ignored]
    if collected.recipe is not None:
        semantic = without_echoes(_semantic(collected.recipe, methods), collected.damaged)
        findings += semantic
        unknown = [finding for finding in semantic if finding.is_unknown_key]
        if lenient and unknown:
            # Without them the recipe is another one: a parameter that is missing may only now be seen to be.
            for finding in unknown:
                delete_at(data, finding.path)
            again = collect(kind, data, names, lenient=lenient)
            if again.recipe is not None:
                findings = [*collected.findings, *ignored, *unknown]
                findings += without_echoes(_semantic(again.recipe, methods), again.damaged)
                collected = Collected(again.recipe, collected.findings, [*collected.damaged, *again.damaged])
    return Collected(collected.recipe, findings, collected.damaged)


def _staged(data: dict[str, Any], methods: Methods, *, lenient: bool) -> Collected:
    """A recipe of several, with all findings."""
    around = collect(Around, data, (), lenient=lenient)
    findings, stages = [_of_each_stage(finding) for finding in around.findings], data[STAGES]
    if not isinstance(stages, list) or not stages:
        what = f"`{STAGES}` is a list of recipes, found {found(stages) if stages != [] else 'an empty list'}"
        return Collected(None, [*findings, Finding((STAGES,), what, _WHAT_TO_WRITE)])
    read = [_single(stage, methods, lenient=lenient) for stage in stages]
    findings += [finding.below((STAGES, i)) for i, stage in enumerate(read) for finding in stage.findings]
    recipes = [s.recipe for s in read if isinstance(s.recipe, DenseRecipe | MoeRecipe) and not s.damaged]
    if len(recipes) < len(stages):
        return Collected(None, findings)
    findings += stage_findings(recipes)
    if any(not finding.is_warning for finding in findings if not (lenient and finding.is_unknown_key)):
        return Collected(None, findings)
    recipe = StagedRecipe(stages=recipes)
    assert isinstance(around.recipe, Around)
    if around.recipe.output == OutputOptions():
        return Collected(recipe, findings)
    if recipe.output != OutputOptions():
        what = f"`output` beside `{STAGES}`, and the last stage has one too"
        return Collected(None, [*findings, Finding(("output",), what, "remove one of them")])
    return Collected(recipe.to(around.recipe.output), findings)


def _of_each_stage(finding: Finding) -> Finding:
    """What stands beside the stages may be meant for each."""
    if finding.is_unknown_key and finding.path[0] in (*DenseRecipe.model_fields, *MoeRecipe.model_fields):
        return replace(finding, hint=f"write {finding.path[0]} in each stage")
    return finding


def check_recipe(recipe: Recipe, *, methods: Methods = METHODS) -> None:
    """Check a recipe built in Python against its merge method; warnings are left out.

    Raises:
        ConfigError: with all that is wrong.
    """
    load_recipe(recipe, on_warning=lambda _: None, methods=methods)


def _tell(
    collected: Collected, document: Document, findings: list[Finding], on_warning: Callable[[Problem], None] | None
) -> Recipe:
    errors = [finding for finding in findings if not finding.is_warning]
    problems = to_problems(errors, document)
    for warning in to_problems(
        [f for f in findings if f.is_warning], Document(None, document.file, document.positions)
    ):
        if on_warning is None:
            warnings.warn(str(warning), RecipeWarning, stacklevel=3)
        else:
            on_warning(warning)
    if problems:
        raise config_error(problems, document.file)
    assert isinstance(collected.recipe, Recipe)  # whoever gives up has found a problem
    return collected.recipe


def _as_warning(finding: Finding) -> Finding:
    return Finding(finding.path, f"{finding.what} (ignored)", finding.hint, is_warning=True)


def _semantic(recipe: object, methods: Methods) -> list[Finding]:
    if isinstance(recipe, StagedRecipe):
        of_stages = enumerate(recipe.stages)
        return [f.below((STAGES, i)) for i, stage in of_stages for f in _semantic(stage, methods)]
    if isinstance(recipe, MoeRecipe):
        findings = moe_findings(recipe)
        if recipe.backbone is not None:
            findings += [finding.below(("backbone",)) for finding in method_findings(recipe.backbone, methods)]
        return findings
    assert isinstance(recipe, DenseRecipe)
    return [*structure_findings(recipe), *method_findings(recipe, methods)]


def _parameter_names(merge_method: object, methods: Methods) -> set[str]:
    if not isinstance(merge_method, str) or merge_method not in methods:
        return set()
    return set(methods.get(merge_method).parameter_names())


def _kind(data: object) -> type[DenseRecipe | MoeRecipe] | Finding:
    """Which kind of recipe ``data`` is, or why that is unclear."""
    if not isinstance(data, dict):
        return Finding((), f"a recipe is a mapping, found {found(data)}", _WHAT_TO_WRITE)
    if STAGES in data:
        return Finding((STAGES,), "a stage cannot have stages of its own", "list all stages side by side")
    bodies = [key for key in BODIES if data.get(key) is not None]
    method = data.get("merge_method")
    if "experts" in data or method == MOE_METHOD:
        if bodies:
            sign = "experts" if "experts" in data else f"merge_method: {MOE_METHOD}"
            what = f"two kinds of recipe in one: `{sign}` (Mixture of Experts) and `{bodies[0]}` (dense merge)"
            return Finding((bodies[0],), what, f"{_WHAT_TO_WRITE} (and may have a dense recipe as its `backbone`)")
        return MoeRecipe
    if bodies or method is not None:
        return DenseRecipe
    if MOE_KEYS & data.keys():
        return MoeRecipe
    if not data:
        return Finding((), "the recipe is empty", _WHAT_TO_WRITE)
    keys = ", ".join(list(data)[:8])
    spelt = "".join(nearest(key, (*BODIES, "experts", "merge_method")) for key in list(data)[:8] if key != "name")
    return Finding((), f"neither kind of recipe; its keys are {keys[:200]}{spelt[:200]}", _WHAT_TO_WRITE)


def _without_ignored(data: dict[str, Any]) -> list[Finding]:
    """Take out what recipes have and nothing reads, with a warning for each."""
    known = {key: why for key, why in _IGNORED_BESIDE_THE_METHOD.items() if key in data}
    findings = [Finding((key,), f"{key} has no effect: {why}", is_warning=True) for key, why in known.items()]
    findings += [Finding(path, "the name of an entry has no effect", is_warning=True) for path in _entry_names(data)]
    for finding in findings:
        delete_at(data, finding.path)
    return findings


def _entry_names(data: object, path: YamlPath = ()) -> Iterator[YamlPath]:
    """Where models, sources and experts have a name."""
    if isinstance(data, dict):
        if len(path) > 1 and path[-2] in _OF_ENTRIES and isinstance(path[-1], int) and "name" in data:
            yield (*path, "name")
        for key, value in data.items():
            yield from _entry_names(value, (*path, key))
    elif isinstance(data, list):
        for index, item in enumerate(data):
            yield from _entry_names(item, (*path, index))


def _ignored_keys(data: object, path: YamlPath = ()) -> list[Finding]:
    """Warnings for the keys of model references that mean nothing here."""
    findings: list[Finding] = []
    if isinstance(data, dict):
        for key, value in data.items():
            if key in IGNORED_KEYS and value is not None and ("model" in data or "path" in data):
                what = f"{key} has no effect: layers are found by looking at the checkpoint"
                findings.append(Finding((*path, key), what, is_warning=True))
            findings += _ignored_keys(value, (*path, key))
    elif isinstance(data, list):
        for index, item in enumerate(data):
            findings += _ignored_keys(item, (*path, index))
    return findings


def _document(source: object, name: str) -> Document:
    if isinstance(source, Mapping):
        return Document(plain(source))
    if isinstance(source, Path):
        return _read_file(source)
    if isinstance(source, bytes):
        return _decoded(source, name)
    if not isinstance(source, str):
        raise ConfigError(
            f"a recipe is a path, YAML text or a mapping, found {type(source).__name__}",
            remedy="pass a pathlib.Path, a str or a dict",
        )
    if "\n" in source:
        return read_yaml(source, name)
    if source.lower().endswith(_SUFFIXES) or _is_file(source):
        return _read_file(Path(source))
    if ": " in source:
        return read_yaml(source, name)
    raise ConfigError(
        f"{found(source)} is neither a file nor YAML text",
        remedy="name a recipe's file, such as merge.yml; text is taken for YAML if it has a line break or ': '",
    )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or holding a null character
        return False


def _read_file(path: Path) -> Document:
    name = "-" if path == Path("/dev/stdin") else str(path)  # as the command line calls standard input
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("there is no such recipe", where=name, remedy=_siblings(path)) from None
    except IsADirectoryError:
        raise ConfigError("this is a folder", where=name, remedy="name the recipe's file in it") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: `~` without a home
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the recipe cannot be read: {reason}", where=name[:200]) from None
    return _decoded(content, name)


def _decoded(content: bytes, name: str) -> Document:
    if len(content) > MAX_TEXT_BYTES:
        raise too_large(name)
    try:
        return read_yaml(content.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"not UTF-8 text: byte 0x{content[error.start]:02x} at line {line}",
            where=f"{name}:{line}",
            remedy="save the recipe as UTF-8",
        ) from None


def _siblings(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in _SUFFIXES]
    except (OSError, ValueError):
        return "check the path"
    near = nearest(path.name, names).removeprefix("; ")
    return near or "check the path"
