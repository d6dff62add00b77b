"""The YAML of a dense merge, as data.

The keys are mergekit's, with ours beside them: ``output``, ``seed``, ``compute_dtype``. What can be said without
knowing the merge methods is checked here, whether a recipe comes from a file or is built in Python;
`mergekit_ray.config.load` adds the rest. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from mergekit_ray.config.accepted import DTypeLike, ModelLike, ParametersLike
from mergekit_ray.config.fields import (
    ArithmeticDType,
    ComputeDType,
    FloatDType,
    LayerRange,
    Name,
    Output,
    OutputOptions,
    ParameterSettings,
    RecipeModel,
    Seed,
    parse_patterns,
    place,
    raise_findings,
    written,
)
from mergekit_ray.config.findings import Finding, did_you_mean
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Level
from mergekit_ray.config.tokenizer import TokenizerOptions, TokenizerSource, tokenizer_findings, tokenizer_of
from mergekit_ray.config.yaml_source import YamlPath
from mergekit_ray.core.shown import preformatted
from mergekit_ray.core.sizes import counted

MOE_METHOD = "moe"
BODIES = ("models", "slices", "modules")
"""The three ways to say what is merged; a recipe uses one of them."""

Missing: TypeAlias = Literal["error", "base", "first", "drop", "merge"]
"""What becomes of a tensor that only some models have."""

Tensors: TypeAlias = Literal["all", "intersection", "union"]
"""Three values of `Missing` in the words of ``mergekit-pytorch``."""

_MISSING_BY_TENSORS: dict[Tensors, Missing] = {"all": "error", "intersection": "drop", "union": "merge"}

Patterns: TypeAlias = Annotated[
    tuple[Name, ...],
    BeforeValidator(parse_patterns),
    Field(min_length=1),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string", "minLength": 1}, "minItems": 1}),
]
"""Names of tensors, with ``*`` for any run of characters."""


class InputModel(RecipeModel):
    """One entry of ``models``: a whole model, all its layers.

    Attributes:
        model: the model: ``org/name``, a folder or a URI, with ``@revision`` and ``+adapter`` as needed.
        parameters: the method's parameters for this model.
    """

    model: ModelReference
    parameters: ParameterSettings = Field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model: ModelLike,
            parameters: ParametersLike = ...,
        ) -> None: ...


class SliceSource(RecipeModel):
    """One entry of a slice's ``sources``: a run of one model's layers.

    Attributes:
        model: the model, as in ``models``.
        layer_range: first layer and the layer after the last, counted from 0: ``[0, 16]`` is layers 0 to 15.
        parameters: the method's parameters for this source.
    """

    model: ModelReference
    layer_range: LayerRange
    parameters: ParameterSettings = Field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model: ModelLike,
            layer_range: Sequence[int],
            parameters: ParametersLike = ...,
        ) -> None: ...

    @property
    def num_layers(self) -> int:
        """Layers in the range."""
        return self.layer_range[1] - self.layer_range[0]


class SliceRecipe(RecipeModel):
    """One entry of ``slices``: a run of the output's layers.

    Attributes:
        sources: the runs of layers to merge; all have the same number of layers.
        base_model: base model of this slice, in place of the recipe's.
        residual_weight: accepted, without effect.
        parameters: the method's parameters for all sources of this slice.
    """

    sources: Annotated[tuple[SliceSource, ...], Field(min_length=1)]
    base_model: ModelReference | None = None
    residual_weight: float | None = None
    parameters: ParameterSettings = Field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            sources: Sequence[SliceSource | Mapping[str, Any]],
            base_model: ModelLike | None = ...,
            residual_weight: float | None = ...,
            parameters: ParametersLike = ...,
        ) -> None: ...


class ModuleRecipe(RecipeModel):
    """One entry of ``modules``: a part of a model that is merged by itself, as ``models`` or as ``slices``.

    Attributes:
        models, slices: the models to merge into this module; give exactly one of the two keys.
        parameters: the method's parameters for this module.
    """

    models: Annotated[tuple[InputModel, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[SliceRecipe, ...], Field(min_length=1)] | None = None
    parameters: ParameterSettings = Field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            models: Sequence[InputModel | Mapping[str, Any]] | None = ...,
            slices: Sequence[SliceRecipe | Mapping[str, Any]] | None = ...,
            parameters: ParametersLike = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if not info.context:
            raise_findings(_body_findings(self))
        return self


class DenseRecipe(RecipeModel):
    """A merge of models of one architecture into one more of it.

    Attributes:
        merge_method: name of the merge method.
        models, slices, modules: the models to merge: whole, as runs of layers, or part by part. Give exactly one of the
            three keys.
        base_model: the model that task vectors are taken from. Config and tokenizer come from it, too; without it, from
            the first model.
        dtype: dtype of the stored weights. By default, each tensor keeps the widest dtype of its inputs. It is not the
            dtype of the arithmetic; that is ``compute_dtype``.
        out_dtype: dtype of the stored weights where it differs from ``dtype``.
        parameters: the method's parameters, wherever no closer level sets them.
        tokenizer_source: where the vocabulary comes from: ``union`` of all models' tokens, ``base`` or a model. By
            default, the tokenizer of ``base_model`` or of the first model is copied.
        tokenizer: the same with more settings: rows of single tokens, and padding.
        chat_template: ``auto`` for the one that most models have, a template's name, a file, or the template.
        name: free text; of a stage, what others call the model that it makes.
        output: where the result goes, unless the command line says so.
        seed: seed of the random masks, which depend on it, the tensor and the model only.
        compute_dtype: precision of the arithmetic. ``inputs`` rounds at every step, as mergekit does.
        missing: what to do with tensors that only some models have: refuse the merge (``error``), take the base model's
            (``base``), take those of the first model that has them (``first``), leave them out (``drop``), or merge
            them from the models that have them (``merge``). By default, an error, except for tensors that
            ``config.json`` does not count as the model's layers: those are the base's.
        tensors: the same by the set of tensors that the result has: those of all models, which must be the same
            (``all``, as ``missing: error``), those that all have (``intersection``, as ``drop``), or those that any
            has (``union``, as ``merge``).
        include, exclude: patterns of tensor names. Tensors that match one of ``include`` (default: all) and none of
            ``exclude`` are merged; all others are copied.
        from_model: written ``from``: the model that tensors are copied from if they are not merged. By default, the
            base model or, without one, the first model.
        keep_precision: of a stage that others merge: hand its tensors on in the precision of the arithmetic, not
            rounded as if they were stored.
    """

    merge_method: Name
    models: Annotated[tuple[InputModel, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[SliceRecipe, ...], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleRecipe], Field(min_length=1)] | None = None
    base_model: ModelReference | None = None
    dtype: FloatDType | None = None
    out_dtype: FloatDType | None = None
    parameters: ParameterSettings = Field(default_factory=dict)
    tokenizer_source: TokenizerSource = None
    tokenizer: TokenizerOptions | None = None
    chat_template: str | None = None
    name: Name | None = None
    output: Output = Field(default_factory=OutputOptions)
    seed: Seed = 0
    compute_dtype: ArithmeticDType = ComputeDType.FLOAT32
    missing: Missing | None = None
    tensors: Tensors | None = None
    include: Patterns | None = None
    exclude: Patterns | None = None
    from_model: ModelReference | None = Field(default=None, alias="from")
    keep_precision: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            merge_method: str,
            models: Sequence[InputModel | Mapping[str, Any]] | None = ...,
            slices: Sequence[SliceRecipe | Mapping[str, Any]] | None = ...,
            modules: Mapping[str, ModuleRecipe | Mapping[str, Any]] | None = ...,
            base_model: ModelLike | None = ...,
            dtype: DTypeLike | None = ...,
            out_dtype: DTypeLike | None = ...,
            parameters: ParametersLike = ...,
            tokenizer_source: ModelLike | None = ...,
            tokenizer: TokenizerOptions | Mapping[str, Any] | None = ...,
            chat_template: str | None = ...,
            name: str | None = ...,
            output: OutputOptions | str | PurePath | Mapping[str, Any] = ...,
            seed: int = ...,
            compute_dtype: ComputeDType | str = ...,
            missing: Missing | None = ...,
            tensors: Tensors | None = ...,
            include: str | Sequence[str] | None = ...,
            exclude: str | Sequence[str] | None = ...,
            from_model: ModelLike | None = ...,
            keep_precision: bool = ...,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _is_dense(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (data.get("experts") is not None or data.get("merge_method") == MOE_METHOD):
            raise PydanticCustomError(
                "recipe_kind",
                "this is a Mixture-of-Experts recipe (it has `experts` or `merge_method: moe`), not a dense one; "
                "read it with mergekit_ray.load_recipe, which serves both kinds, or MoeRecipe.model_validate",
            )
        return data

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if not info.context:
            raise_findings(structure_findings(self))
        return self

    @property
    def kind(self) -> str:
        """In words."""
        return "a dense recipe"

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what is left at its default; `load_recipe` reads it back to an equal one."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)

    def to_yaml(self) -> str:
        """As the text of a recipe's file."""
        return written(self.to_data())

    def __repr__(self) -> str:
        models = counted(len(self.model_references()), "model")
        return f"<DenseRecipe {self.merge_method} of {models}{place(self.output)}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return preformatted(self.to_yaml())

    @property
    def of_missing(self) -> Missing | None:
        """What ``missing`` or ``tensors`` says."""
        return self.missing if self.tensors is None else _MISSING_BY_TENSORS[self.tensors]

    @property
    def vocabulary(self) -> TokenizerOptions | None:
        """See `tokenizer_of`."""
        return tokenizer_of(self.tokenizer, self.tokenizer_source)

    def model_references(self) -> tuple[ModelReference, ...]:
        """Every model that is merged or a base, once each: the recipe's ``base_model`` first, then as listed."""
        named: dict[ModelReference, None] = {} if self.base_model is None else {self.base_model: None}
        for _, _, group in groups(self):
            for model in group:
                if isinstance(model, SliceRecipe):
                    named |= {model.base_model: None} if model.base_model is not None else {}
                    named |= dict.fromkeys(source.model for source in model.sources)
                else:
                    named[model.model] = None
        return tuple(named)

    @property
    def donor(self) -> ModelReference:
        """Whose config, tokenizer and side files the output gets: ``base_model``, or the first model listed."""
        if self.base_model is not None:
            return self.base_model
        for _, _, group in groups(self):
            for model in group:
                return model.sources[0].model if isinstance(model, SliceRecipe) else model.model
        raise ValueError("a recipe without models has no donor")


Group: TypeAlias = tuple[YamlPath, tuple[str | None, Level], tuple[InputModel | SliceRecipe, ...]]


def groups(recipe: DenseRecipe) -> Iterator[Group]:
    """Each list of models or slices: its path, its module's name and parameters (None and {} without one), the list."""
    bodies: list[tuple[YamlPath, tuple[str | None, Level], DenseRecipe | ModuleRecipe]] = [((), (None, {}), recipe)]
    for name, module in (recipe.modules or {}).items():
        bodies.append((("modules", name), (name, module.parameters), module))
    for path, module_of, body in bodies:
        if body.models is not None:
            yield (*path, "models"), module_of, body.models
        if body.slices is not None:
            yield (*path, "slices"), module_of, body.slices


def structure_findings(recipe: DenseRecipe) -> list[Finding]:
    """What is wrong across fields, whatever the method."""
    findings = _body_findings(recipe)
    for name, module in (recipe.modules or {}).items():
        findings += [finding.below(("modules", name)) for finding in _body_findings(module)]
    for path, _, group in groups(recipe):
        for index, piece in enumerate(group):
            if isinstance(piece, SliceRecipe):
                findings += _uneven(piece, (*path, index))
    findings += tokenizer_findings(recipe.tokenizer, recipe.tokenizer_source)
    if recipe.tensors is not None and recipe.missing is not None:
        what = f"`tensors: {recipe.tensors}` and `missing: {recipe.missing}` both decide on what only some models have"
        findings.append(Finding(("tensors",), what, "leave out one of the two"))
    return findings + _source_findings(recipe)


def _source_findings(recipe: DenseRecipe) -> list[Finding]:
    """What is wrong with ``from``."""
    if recipe.from_model is None:
        return []
    if recipe.include is None and recipe.exclude is None:
        what = "`from` has no effect: every tensor is merged"
        return [Finding(("from",), what, "choose with `include` or `exclude` what is not merged", is_warning=True)]
    known = recipe.model_references()
    if recipe.from_model in known:
        return []
    names = [str(reference) for reference in known]
    what = f"`from` names {str(recipe.from_model)!r}, which the recipe does not merge; accepted: {', '.join(names)}"
    hint = did_you_mean(str(recipe.from_model), names)
    return [Finding(("from",), what, hint, depends=(("from",), *((body,) for body in BODIES), ("base_model",)))]


def _body_findings(body: DenseRecipe | ModuleRecipe) -> list[Finding]:
    allowed = BODIES if isinstance(body, DenseRecipe) else BODIES[:2]
    given = [key for key in allowed if getattr(body, key) is not None]
    if len(given) == 1:
        return []
    accepted = ", ".join(f"`{key}`" for key in allowed[:-1]) + f" or `{allowed[-1]}`"
    depends = tuple((key,) for key in allowed)
    if not given:
        hint = "list whole models under `models:`, or runs of layers under `slices:`"
        return [Finding((), f"nothing to merge: none of {accepted} is given", hint, depends=depends)]
    both = " and ".join(f"`{key}`" for key in given)
    return [Finding((given[-1],), f"{both} are both given; accepted: exactly one of {accepted}", "remove all but one")]


def _uneven(piece: SliceRecipe, path: YamlPath) -> list[Finding]:
    counts = [source.num_layers for source in piece.sources]
    if len(set(counts)) <= 1:
        return []
    shown = ", ".join(
        f"[{source.layer_range[0]}, {source.layer_range[1]}] ({source.num_layers})" for source in piece.sources
    )
    index = next(i for i, count in enumerate(counts) if count != counts[0])
    what = f"the sources of one slice have different numbers of layers: {shown}"
    where = (*path, "sources", index, "layer_range")
    return [Finding(where, what, "give every source a range of the same length", depends=((*path, "sources"),))]
