"""The tokenizer of a dense recipe: ``tokenizer_source`` and the ``tokenizer`` section."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mergekit_ray.config.accepted import ModelLike
from mergekit_ray.config.fields import RecipeModel, raise_findings
from mergekit_ray.config.findings import Finding, details_of, did_you_mean, findings_of, found
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.transplant import Approximation, TransplantOptions

_WORDS = ("union", "base")
_MAX_MULTIPLE = 1 << 20
"""More rows than any vocabulary has: what is beyond is a mistake that would take all memory."""


class ZeroEmbedding(RecipeModel):
    """A token whose embedding is all zeros.

    Attributes:
        kind: ``zero``; a recipe must say it.
    """

    kind: Literal["zero"] = "zero"


class ModelTokenEmbedding(RecipeModel):
    """A token that takes the embedding of a model's token.

    Attributes:
        kind: ``model_token``; a recipe must say it.
        model: whose embedding.
        token_id, token: which of its tokens; exactly one is given.
    """

    kind: Literal["model_token"] = "model_token"
    model: ModelReference
    token_id: Annotated[int, Field(ge=0)] | None = None
    token: str | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["model_token"] = ...,
            model: ModelLike,
            token_id: int | None = ...,
            token: str | None = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if (self.token_id is None) == (self.token is None):
            raise ValueError("a model's token is named by either `token` or `token_id`")
        return self


TokenSource: TypeAlias = ZeroEmbedding | ModelTokenEmbedding | ModelReference


def _parse_token_source(value: object) -> TokenSource | None:
    if value is None or isinstance(value, ZeroEmbedding | ModelTokenEmbedding | ModelReference):
        return value
    if value == "zero":
        raise ValueError("'zero' is a kind of source, not a model\nwrite `{kind: zero}`; for a folder, ./zero")
    if not isinstance(value, Mapping) or "kind" not in value:
        return ModelReference.from_data(value)
    kind = value["kind"]
    kinds = {"zero": ZeroEmbedding, "model_token": ModelTokenEmbedding}
    if not isinstance(kind, str) or kind not in kinds:
        hint = did_you_mean(kind, kinds) if isinstance(kind, str) else ""
        raise ValueError(f"unknown kind {found(kind)}; accepted: {', '.join(kinds)}\n{hint}")
    model: type[ZeroEmbedding | ModelTokenEmbedding] = kinds[kind]  # type: ignore[assignment] # mypy joins the classes to their base
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise_findings(findings_of(details_of(error), model))
        raise


def _dump_token_source(source: TokenSource | None) -> Any:
    if isinstance(source, RecipeModel):
        return source.model_dump(mode="json", exclude_none=True)
    return None if source is None else str(source)


def _parse_tokenizer_source(value: object) -> str | ModelReference | None:
    if value is None or isinstance(value, ModelReference):
        return value
    if isinstance(value, str):
        word = value.strip()
        if word in _WORDS:
            return word
        is_path = word.startswith((".", "/", "~")) or "://" in word
        if not is_path and (near := difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.75)):
            hint = f"did you mean {near[0]!r}? For a folder, write ./{word}"
            raise ValueError(f"{word!r} is neither union nor base\n{hint}")
        # mergekit's first spelling of a model here, still found in recipes.
        return ModelReference.parse(word.removeprefix("model:"))
    return ModelReference.from_data(value)


def _dump_tokenizer_source(source: str | ModelReference | None) -> str | None:
    return None if source is None else str(source)


TokenizerSource = Annotated[
    Literal["union", "base"] | ModelReference | None,
    PlainValidator(_parse_tokenizer_source),
    PlainSerializer(_dump_tokenizer_source),
    WithJsonSchema({"type": ["string", "object", "null"]}),
]
"""``union``, ``base``, or a model."""


class TokenEmbedding(RecipeModel):
    """Where one token's embedding comes from.

    Attributes:
        source: a model, a token of a model (``kind: model_token``), or zeros (``kind: zero``). Without it, the token
            has the base's row, or the mean of the rows of those models that have the token.
        force: take it from there even for models that have the token.
    """

    source: Annotated[
        TokenSource | None,
        PlainValidator(_parse_token_source),
        PlainSerializer(_dump_token_source),
        WithJsonSchema({"type": ["string", "object", "null"]}),
    ] = None
    force: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            source: TokenSource | ModelLike | None = ...,
            force: bool = ...,
        ) -> None: ...


class TokenizerOptions(RecipeModel):
    """The ``tokenizer`` section.

    Attributes:
        source: where the vocabulary comes from.
        tokens: embeddings of single tokens.
        pad_to_multiple_of: the vocabulary is padded to a multiple of this.
        approximate: how models get rows for the tokens of ``source`` that they lack, as `transplant` makes them: the
            name of a method, or ``method`` with its options. Without it, they get other models' rows.
    """

    source: TokenizerSource = "union"
    tokens: dict[str, TokenEmbedding] | None = None
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=_MAX_MULTIPLE)] | None = None
    approximate: Approximation = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            source: ModelLike | None = ...,
            tokens: Mapping[str, TokenEmbedding | Mapping[str, Any]] | None = ...,
            pad_to_multiple_of: int | None = ...,
            approximate: TransplantOptions | str | Mapping[str, Any] | None = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _approximated_from_one(self) -> Self:
        if self.approximate is not None and self.source == "union":
            raise ValueError(
                "`approximate` makes rows from those of one model, and `source` is union\n"
                "name the model whose tokens all are to have: `source: org/model`, or `source: base`"
            )
        if self.approximate is not None and self.approximate.magikarp:
            raise ValueError("`magikarp` is an option of `transplant`, not of a merge\nleave it out")
        return self

    @field_validator("tokens")
    @classmethod
    def _can_be_written(cls, tokens: dict[str, TokenEmbedding] | None) -> dict[str, TokenEmbedding] | None:
        for token in tokens or ():
            try:
                token.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{token!r} is not valid Unicode, and so no token") from None
        return tokens

    def model_references(self) -> tuple[ModelReference, ...]:
        """The models that are named here, once each."""
        named: list[object] = [self.source, *(entry.source for entry in (self.tokens or {}).values())]
        models = [source.model if isinstance(source, ModelTokenEmbedding) else source for source in named]
        return tuple(dict.fromkeys(model for model in models if isinstance(model, ModelReference)))


def tokenizer_of(tokenizer: TokenizerOptions | None, source: str | ModelReference | None) -> TokenizerOptions | None:
    """What the keys ``tokenizer`` and ``tokenizer_source`` ask for; None if the donor's tokenizer is to be copied."""
    return TokenizerOptions(source=source) if tokenizer is None and source is not None else tokenizer


def tokenizer_findings(tokenizer: TokenizerOptions | None, source: str | ModelReference | None) -> list[Finding]:
    """Whether both keys are given."""
    if tokenizer is None or source is None:
        return []
    hint = "keep `tokenizer: {source: ...}`, which says more"
    return [Finding(("tokenizer_source",), "`tokenizer_source` beside `tokenizer`", hint)]
