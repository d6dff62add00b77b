"""The YAML of a Mixture of Experts made of dense models, as data.

The keys are mergekit-moe's, with ours beside them: ``backbone``, ``expert_layout``, ``add_to_base``,
``allow_identical_experts``, ``output``, ``seed``, ``compute_dtype``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mergekit_ray.config.accepted import DTypeLike, ModelLike
from mergekit_ray.config.fields import (
    ArithmeticDType,
    ComputeDType,
    FloatDType,
    Name,
    Output,
    OutputOptions,
    RecipeModel,
    Seed,
    place,
    raise_findings,
    written,
)
from mergekit_ray.config.findings import Finding, did_you_mean, found
from mergekit_ray.config.recipe import BODIES, MOE_METHOD, DenseRecipe, structure_findings
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.tokenizer import TokenizerOptions, TokenizerSource, tokenizer_findings, tokenizer_of
from mergekit_ray.config.yaml_source import YamlPath
from mergekit_ray.core.shown import preformatted
from mergekit_ray.core.sizes import counted

MOE_KEYS = frozenset(
    {"experts", "shared_experts", "gate_mode", "experts_per_token", "backbone", "expert_layout", "add_to_base"}
)
"""Keys that only an MoE recipe has."""


class GateMode(enum.Enum):
    """How the router vectors are made."""

    HIDDEN = "hidden"
    """From the base model's hidden states at the prompts' last tokens; the same as `HIDDEN_LAST`."""
    HIDDEN_AVG = "hidden_avg"
    HIDDEN_LAST = "hidden_last"
    CHEAP_EMBED = "cheap_embed"
    """From the prompts' input embeddings."""
    RANDOM = "random"
    """Standard normal."""
    UNIFORM_RANDOM = "uniform_random"

    @property
    def needs_prompts(self) -> bool:
        """Whether router vectors come from prompts."""
        return self not in (GateMode.RANDOM, GateMode.UNIFORM_RANDOM)

    @property
    def needs_states(self) -> bool:
        """Whether the base model's layers are run for them."""
        return self.needs_prompts and self is not GateMode.CHEAP_EMBED


def _parse_gate_mode(value: object) -> GateMode:
    if isinstance(value, GateMode):
        return value
    accepted = [mode.value for mode in GateMode]
    if not isinstance(value, str) or value not in accepted:
        hint = did_you_mean(value, accepted) if isinstance(value, str) else ""
        raise ValueError(f"unknown gate_mode {found(value)}; accepted: {', '.join(accepted)}\n{hint}")
    return GateMode(value)


def _parse_prompts(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):  # one prompt, written without its dash
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of prompts, found {found(value)}")
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index + 1} is not text but {found(prompt)}\nquote it")
    return tuple(value)


Prompts = Annotated[
    tuple[str, ...],
    PlainValidator(_parse_prompts),
    PlainSerializer(list),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}}),
]


class ExpertRecipe(RecipeModel):
    """One expert.

    Attributes:
        source_model: the dense model whose feed-forward layers become the expert.
        positive_prompts: prompts that the router should send to the expert. Required unless routers are random.
        negative_prompts: prompts that the router should not send to the expert.
        noise_scale: standard deviation of normal noise added to the expert's weights.
        residual_scale: factor on the expert's down projection.
    """

    source_model: ModelReference
    positive_prompts: Prompts = ()
    negative_prompts: Prompts = ()
    noise_scale: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    residual_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            source_model: ModelLike,
            positive_prompts: str | Sequence[str] = ...,
            negative_prompts: str | Sequence[str] = ...,
            noise_scale: float | None = ...,
            residual_scale: float | None = ...,
        ) -> None: ...


def _parse_merge_method(value: object) -> object:
    if value is not None and value != MOE_METHOD:
        raise ValueError(f"a recipe with experts takes `merge_method: moe` or none, found {found(value)}")
    return MOE_METHOD


class MoeRecipe(RecipeModel):
    """A Mixture of Experts whose experts are the feed-forward layers of dense models.

    Attributes:
        merge_method: ``moe``, or left out.
        base_model: the model that everything outside the feed-forward layers comes from, config and tokenizer included.
        experts: the experts, at least one.
        shared_experts: at most one expert that every token passes through.
        gate_mode: how routers are made: from hidden states, from input embeddings, or at random.
        add_to_base: add ``experts`` to ``base_model``, which is a Mixture of Experts already. All of its tensors stay;
            each router gets a row for each new expert.
        experts_per_token: number of experts each token uses. By default 2 or, with ``add_to_base``, the base model's
            number.
        architecture: name of the MoE family. By default, the first that fits.
        dtype: dtype of the stored weights. By default, the base model's.
        backbone: a dense recipe for the tensors outside the feed-forward layers, in place of ``base_model``
            (Branch-Train-MiX, arXiv 2403.07816).
        tokenizer_source, tokenizer, chat_template: as in a dense recipe, over all models.
        expert_layout: one tensor for each expert and projection, or all experts of a layer packed into one.
        allow_identical_experts: accept experts that no router can tell apart, to be trained afterwards.
        name, output, seed, compute_dtype: as in a dense recipe.
    """

    merge_method: Annotated[Literal["moe"], BeforeValidator(_parse_merge_method)] = "moe"
    base_model: ModelReference
    experts: Annotated[tuple[ExpertRecipe, ...], Field(min_length=1)]
    shared_experts: tuple[ExpertRecipe, ...] | None = None
    gate_mode: Annotated[
        GateMode,
        PlainValidator(_parse_gate_mode),
        PlainSerializer(lambda mode: mode.value),
        WithJsonSchema({"enum": [mode.value for mode in GateMode]}),
    ] = GateMode.HIDDEN
    experts_per_token: Annotated[int, Field(ge=1)] | None = None
    architecture: Name | None = None
    dtype: FloatDType | None = None
    backbone: DenseRecipe | None = None
    tokenizer_source: TokenizerSource = None
    tokenizer: TokenizerOptions | None = None
    chat_template: str | None = None
    expert_layout: Literal["separate", "packed"] = "separate"
    add_to_base: bool = False
    allow_identical_experts: bool = False
    name: Name | None = None
    output: Output = Field(default_factory=OutputOptions)
    seed: Seed = 0
    compute_dtype: ArithmeticDType = ComputeDType.FLOAT32

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            merge_method: Literal["moe"] = ...,
            base_model: ModelLike,
            experts: Sequence[ExpertRecipe | Mapping[str, Any]],
            shared_experts: Sequence[ExpertRecipe | Mapping[str, Any]] | None = ...,
            gate_mode: GateMode | str = ...,
            experts_per_token: int | None = ...,
            architecture: str | None = ...,
            dtype: DTypeLike | None = ...,
            backbone: DenseRecipe | Mapping[str, Any] | None = ...,
            tokenizer_source: ModelLike | None = ...,
            tokenizer: TokenizerOptions | Mapping[str, Any] | None = ...,
            chat_template: str | None = ...,
            expert_layout: Literal["separate", "packed"] = ...,
            add_to_base: bool = ...,
            allow_identical_experts: bool = ...,
            name: str | None = ...,
            output: OutputOptions | str | PurePath | Mapping[str, Any] = ...,
            seed: int = ...,
            compute_dtype: ComputeDType | str = ...,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _is_moe(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "experts" not in data and any(data.get(key) is not None for key in BODIES):
            raise PydanticCustomError(
                "recipe_kind",
                "this is a dense recipe (it has `models`, `slices` or `modules`), not a Mixture of Experts; "
                "read it with mergekit_ray.load_recipe, which serves both kinds, or DenseRecipe.model_validate",
            )
        return data

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if not info.context:
            raise_findings(moe_findings(self))
        return self

    @property
    def vocabulary(self) -> TokenizerOptions | None:
        """See `tokenizer_of`; that of the backbone is its own."""
        return tokenizer_of(self.tokenizer, self.tokenizer_source)

    @property
    def num_active(self) -> int:
        """Experts per token: as given, else 2, or 1 where there is only one expert."""
        return self.experts_per_token if self.experts_per_token is not None else min(2, len(self.experts))

    @property
    def kind(self) -> str:
        """In words."""
        return "a Mixture-of-Experts recipe"

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what is left at its default; `load_recipe` reads it back to an equal one."""
        return {"merge_method": MOE_METHOD} | self.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
        )

    def to_yaml(self) -> str:
        """As the text of a recipe's file."""
        return written(self.to_data())

    def __repr__(self) -> str:
        experts = counted(len(self.experts), "expert")
        return f"<MoeRecipe {experts} on {self.base_model}{place(self.output)}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return preformatted(self.to_yaml())

    def model_references(self) -> tuple[ModelReference, ...]:
        """Every model named, once each: ``base_model`` first, then experts, shared experts, and the backbone's."""
        experts = [*self.experts, *(self.shared_experts or ())]
        backbone = self.backbone.model_references() if self.backbone is not None else ()
        return tuple(dict.fromkeys([self.base_model, *(expert.source_model for expert in experts), *backbone]))

    @property
    def donor(self) -> ModelReference:
        """The model whose config, tokenizer and side files the output starts from."""
        return self.base_model


def moe_findings(recipe: MoeRecipe) -> list[Finding]:
    """What is wrong across fields and can be said without looking at a model."""
    findings: list[Finding] = []
    num_experts = len(recipe.experts)
    if recipe.add_to_base:
        findings += _addition_findings(recipe)
    elif recipe.experts_per_token is not None and recipe.experts_per_token > num_experts:
        what = f"a token cannot use {recipe.experts_per_token} experts of {num_experts}"
        hint = f"accepted: 1 to {num_experts}"
        findings.append(Finding(("experts_per_token",), what, hint, depends=(("experts_per_token",), ("experts",))))
    if recipe.shared_experts and len(recipe.shared_experts) > 1:
        what = f"at most one shared expert, found {len(recipe.shared_experts)}"
        findings.append(
            Finding(("shared_experts", 1), what, "move the others to `experts`", depends=(("shared_experts",),))
        )
    if recipe.gate_mode.needs_prompts:
        findings += _prompt_findings(recipe)
    findings += tokenizer_findings(recipe.tokenizer, recipe.tokenizer_source)
    if recipe.backbone is not None:
        for key in ("tokenizer_source", "tokenizer", "chat_template"):
            if getattr(recipe, key) is not None and _speaks_of_tokens(recipe.backbone):
                findings.append(Finding((key,), f"`{key}` here and in the backbone", "keep one of them"))
        findings += [finding.below(("backbone",)) for finding in structure_findings(recipe.backbone)]
    return findings


def _addition_findings(recipe: MoeRecipe) -> list[Finding]:
    """What a recipe that adds to a Mixture of Experts cannot say."""
    what = "`add_to_base` keeps everything of base_model and only adds experts"
    changes = {
        "shared_experts": recipe.shared_experts,
        "backbone": recipe.backbone,
        "tokenizer_source": recipe.tokenizer_source,
        "tokenizer": recipe.tokenizer,
    }
    found = [Finding((key,), what, f"remove `{key}`") for key, value in changes.items() if value]
    if recipe.expert_layout == "packed":
        found.append(Finding(("expert_layout",), what, "remove `expert_layout`: the base model's is kept"))
    return found


def _speaks_of_tokens(recipe: DenseRecipe) -> bool:
    return recipe.vocabulary is not None or recipe.chat_template is not None


def _empty_prompts(recipe: MoeRecipe) -> Iterator[Finding]:
    """Warnings."""
    what = "this prompt is empty: the router sees the token that begins a text, or nothing if there is none"
    for key in ("experts", "shared_experts"):
        for i, expert in enumerate(getattr(recipe, key) or ()):
            for kind in ("positive_prompts", "negative_prompts"):
                for number, prompt in enumerate(getattr(expert, kind)):
                    if not prompt.strip():
                        hint = "write what the expert is for"
                        yield Finding((key, i, kind, number), what, hint, is_warning=True)


def _prompt_findings(recipe: MoeRecipe) -> list[Finding]:
    mode = f"gate_mode {recipe.gate_mode.value!r}"
    findings = []
    for index, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            path: YamlPath = ("experts", index)
            what = f"{mode} makes the router from prompts, and this expert has no `positive_prompts`"
            hint = "list positive_prompts, or choose `gate_mode: random`"
            depends = (("gate_mode",), (*path, "positive_prompts"))
            findings.append(Finding((*path, "positive_prompts"), what, hint, depends=depends))
    findings += _empty_prompts(recipe)
    if len(recipe.experts) == 1 or recipe.allow_identical_experts or any(not f.is_warning for f in findings):
        return findings
    hint = "or set `allow_identical_experts: true` if the model is trained afterwards"
    prompts = {(expert.positive_prompts, expert.negative_prompts) for expert in recipe.experts}
    if len(prompts) == 1:
        what = "all experts have the same prompts, so the router cannot tell them apart"
        findings.append(Finding(("experts",), what, f"give each expert prompts of its own, {hint}"))
    if len({expert.source_model for expert in recipe.experts}) == 1:
        noisy = any(expert.noise_scale for expert in recipe.experts)
        if not noisy:
            what = (
                f"all experts are {recipe.experts[0].source_model}, so choosing between them by prompts changes nothing"
            )
            findings.append(Finding(("experts",), what, f"name different source models, {hint}"))
    return findings
