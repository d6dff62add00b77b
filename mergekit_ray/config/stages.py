"""Several merges in one recipe: a later one merges what an earlier one makes, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from mergekit_ray.config.fields import Name, Output, OutputOptions, RecipeModel, place, raise_findings, written
from mergekit_ray.config.findings import Finding
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.written import as_part
from mergekit_ray.config.yaml_source import STAGES
from mergekit_ray.core.shown import preformatted
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import closest

MAX_STAGES: Final = 50
"""More than anybody writes by hand. A tensor's expression is as deep as there are stages."""

Stage: TypeAlias = DenseRecipe | MoeRecipe
"""One merge."""


def _parse_stage(value: object) -> object:
    if isinstance(value, Mapping):
        return (MoeRecipe if "experts" in value else DenseRecipe).model_validate(value)
    return value


class Around(RecipeModel):
    """What a recipe's file may say beside its stages.

    Attributes:
        stages: not looked at.
        output: of the last stage.
        name: free text.
    """

    stages: Any
    output: Output = Field(default_factory=OutputOptions)
    name: Name | None = None


class StagedRecipe(RecipeModel):
    """Merges that build on each other. Only the last one's model is written, and those that have an ``output``.

    Attributes:
        stages: the merges. Those that others merge have a ``name``; the one that no other merges is the last.
    """

    stages: Annotated[tuple[Annotated[Stage, BeforeValidator(_parse_stage)], ...], Field(min_length=1)]

    if TYPE_CHECKING:

        def __init__(self, *, stages: Sequence[Stage | Mapping[str, Any]]) -> None: ...

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> StagedRecipe:
        if not info.context:
            raise_findings(stage_findings(self.stages))
        return self

    @property
    def ordered(self) -> tuple[Stage, ...]:
        """Each stage after those that it merges."""
        return _ordered(self.stages)

    @property
    def last(self) -> Stage:
        """The stage whose model is the result."""
        return self.ordered[-1]

    @property
    def output(self) -> OutputOptions:
        """That of the last stage."""
        return self.last.output

    @property
    def seed(self) -> int:
        """That of the last stage."""
        return self.last.seed

    @property
    def donor(self) -> ModelReference:
        """That of the last stage."""
        return self.last.donor

    def to(self, output: OutputOptions) -> StagedRecipe:
        """The recipe with another output."""
        changed = self.last.model_copy(update={"output": output})
        return StagedRecipe(stages=[changed if stage is self.last else stage for stage in self.stages])

    @property
    def written(self) -> tuple[Stage, ...]:
        """Those that are written and not the last, in order."""
        return tuple(stage for stage in self.ordered[:-1] if stage.output.path is not None)

    def upto(self, stage: Stage) -> StagedRecipe | Stage:
        """The recipe of which a stage is the last; the stage itself if it merges no other."""
        wanted = {id(stage)}
        for each in reversed(self.ordered):
            if id(each) in wanted:
                wanted |= {id(self.named[name]) for name in _used(each) & self.named.keys()}
        stages = [each for each in self.stages if id(each) in wanted]
        part = StagedRecipe(stages=stages) if len(stages) > 1 else stage
        return as_part(part, self, part.to_data(), stage.name)

    @property
    def named(self) -> Mapping[str, Stage]:
        """The stages that have a name, by it."""
        return {stage.name: stage for stage in self.stages if stage.name is not None}

    def model_references(self) -> tuple[ModelReference, ...]:
        """Every model that is no stage, once each."""
        found = [reference for stage in self.ordered for reference in stage.model_references()]
        return tuple(dict.fromkeys(reference for reference in found if not self.is_stage(reference)))

    def is_stage(self, reference: ModelReference) -> bool:
        """Whether a reference names a stage."""
        return reference.path in self.named

    @property
    def kind(self) -> str:
        """In words."""
        return f"a recipe of {counted(len(self.stages), 'stage')}"

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what is left at its default; `load_recipe` reads it back to an equal one."""
        return {STAGES: [stage.to_data() for stage in self.stages]}

    def to_yaml(self) -> str:
        """As the text of a recipe's file."""
        return written(self.to_data())

    def __repr__(self) -> str:
        return f"<StagedRecipe of {counted(len(self.stages), 'stage')}{place(self.output)}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return preformatted(self.to_yaml())


def stage_findings(stages: Sequence[Stage]) -> list[Finding]:
    """What is wrong among stages, each of which is sound."""
    if len(stages) > MAX_STAGES:
        what = f"{len(stages)} stages; at most {MAX_STAGES} are merged in one pass"
        return [Finding((STAGES,), what, "write the model of one of them, with a recipe of its own, and merge that")]
    findings = [*_names(stages), *_changed_references(stages)]
    if findings:
        return findings
    if circle := _circle(stages):
        what = f"stages merge each other in a circle: {' -> '.join(circle)}"
        place = next(i for i, stage in enumerate(stages) if stage.name == circle[0])
        return [Finding((STAGES, place), what, "a stage merges models, and stages that do not merge it")]
    used = {name for stage in stages for name in _used(stage)}
    *unused, last = (i for i, stage in enumerate(stages) if stage.name not in used)
    for i in unused:
        if stages[i].output.path is None:
            name = stages[i].name
            what = f"nothing merges stage {name!r}" if name else "this stage has no `name`, so no other can merge it"
            near = None if name is None else closest(name, used - {stage.name for stage in stages})
            hint = (
                f"{'merge it' if name else 'give it a `name` and merge it'} in another stage, give it an `output`, or "
            )
            hint = f"for {near!r}, did you mean {name!r}?" if near else f"{hint}remove it"
            findings.append(Finding((STAGES, i), what, hint))
    if getattr(stages[last], "keep_precision", False):
        findings.append(no_effect_of_precision().below((STAGES, last)))
    return findings


def _names(stages: Sequence[Stage]) -> Iterator[Finding]:
    """Names that two stages have, or that would mean something else where a model is named."""
    first: dict[str, int] = {}
    for i, stage in enumerate(stages):
        if stage.name is not None and (
            re.search(r"[@+\\]|^\s|\s$", stage.name) or stage.name.startswith((".", "/", "~"))
        ):
            what = f"a stage cannot be called {stage.name!r}: as a model, that is a path, a revision or an adapter"
            yield Finding((STAGES, i, "name"), what, "use letters, digits, `-` and `_`")
        if stage.name is not None and first.setdefault(stage.name, i) != i:
            what = f"two stages have the name {stage.name!r}; the other is {STAGES}[{first[stage.name]}]"
            yield Finding((STAGES, i, "name"), what, "give each stage a name of its own")


def _changed_references(stages: Sequence[Stage]) -> Iterator[Finding]:
    """Stages that are named with what only models have."""
    names = {stage.name for stage in stages}
    for i, stage in enumerate(stages):
        for reference in _references(stage):
            if reference.path in names and reference.revision is not None:
                yield Finding((STAGES, i), f"{str(reference)!r} names a stage with a revision", "leave it out")


def no_effect_of_precision() -> Finding:
    """A warning for a merge that is written, and keeps no precision beyond its dtype."""
    what = "`keep_precision` has no effect: it is for stages that others merge"
    return Finding(("keep_precision",), what, "set `dtype: float32` to store the result so", is_warning=True)


def _references(stage: Stage) -> Iterator[ModelReference]:
    """All models that a stage names, for its tokenizer too."""
    parts: list[Stage] = [stage]
    if isinstance(stage, MoeRecipe) and stage.backbone is not None:
        parts.append(stage.backbone)
    yield from stage.model_references()
    for part in parts:
        if part.vocabulary is not None:
            yield from part.vocabulary.model_references()


def _used(stage: Stage) -> set[str]:
    """The names that a stage's models may have as stages."""
    return {reference.path for reference in _references(stage)}


def _circle(stages: Sequence[Stage]) -> list[str]:
    """The names along a circle, the first one again at the end; empty if there is none."""
    named = {stage.name: stage for stage in stages if stage.name is not None}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for below in sorted(_used(named[name]) & named.keys()):
            found = visit(below, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in named)), [])


def _ordered(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Each stage after those that it merges; else as listed, and the last one that nothing merges at the end."""
    named = {stage.name: stage for stage in stages if stage.name is not None}
    found: dict[int, Stage] = {}

    def visit(stage: Stage) -> None:
        if id(stage) not in found:
            below = _used(stage)
            for name, other in named.items():
                if name in below:
                    visit(other)
            found[id(stage)] = stage

    used = {name for stage in stages for name in _used(stage)}
    last = [stage for stage in stages if stage.name not in used][-1]
    for stage in [*(stage for stage in stages if stage is not last), last]:
        visit(stage)
    return tuple(found.values())
