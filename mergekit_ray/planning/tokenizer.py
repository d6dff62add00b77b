"""The tokenizer of the output: the donor's, which all models must agree with, or one built as the recipe asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mergekit_ray.checkpoint.side_files import is_tokenizer_file, is_vocabulary_file
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.retokenising import retokenised
from mergekit_ray.tokenizers.chat.rendering import check_template
from mergekit_ray.tokenizers.chat.templates import (
    AUTO,
    FILE_NAME,
    MAX_TEMPLATE_BYTES,
    chat_template_of,
    most_common,
    stored_template,
)
from mergekit_ray.tokenizers.comparing import Difference, difference, same_files
from mergekit_ray.tokenizers.files import TOKENIZER, tokenizer_files
from mergekit_ray.tokenizers.reading import Tokenizer, read_tokenizer

_OLD_TEMPLATE: Final = "chat_template.json"
_SETTINGS: Final = "tokenizer_config.json"
_MORE_TEMPLATES: Final = "additional_chat_templates/"


@dataclass(frozen=True)
class OutputTokenizer:
    """What the output's tokenizer makes of a merge.

    Attributes:
        models: every model, with the tokens of the output where it is built.
        is_built: whether the models have been brought to common tokens.
        rows: of embedding and head, where they are not those of the models.
        files: of the tokenizer and its chat template, by name; all others are the donor's.
        template: the chat template that the recipe asks for; None if it asks for none.
        keeps_templates: whether the donor's additional chat templates fit.
        warnings: what the user should know.
    """

    models: Mapping[ModelReference, Model]
    is_built: bool = False
    rows: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    keeps_templates: bool = True
    warnings: Sequence[str] = ()

    def replaces(self, name: str) -> bool:
        """Whether a file of the donor's has no place beside ``files``, which it would contradict."""
        if name in self.files or not self.files:
            return False
        if name.startswith(_MORE_TEMPLATES):
            return not self.keeps_templates
        return is_tokenizer_file(name) if "tokenizer.json" in self.files else name == _OLD_TEMPLATE


def tokenizer_of(recipe: DenseRecipe | MoeRecipe, models: Mapping[ModelReference, Model]) -> OutputTokenizer:
    """Build the tokenizer and the chat template that a recipe asks for, and see the models with its tokens.

    Args:
        recipe: validated.
        models: every model that is named, as it is stored.

    Raises:
        ModelError, PlanError: see `retokenised`; or a chat template that is broken.
        CheckpointError, StorageError: a tokenizer could not be read.
    """
    part = part_on_tokens(recipe)
    if part.vocabulary is None and part.chat_template is None:
        return OutputTokenizer(models)
    donor = recipe.donor
    merged = list(dict.fromkeys([donor, *recipe.model_references()]))
    warnings: list[str] = []
    template = None
    if part.chat_template is not None:
        template, warnings = _template(part.chat_template, [models[reference] for reference in merged])
    rows, files = None, {}
    tokens: Tokenizer | None = None
    if part.vocabulary is not None:
        base = part.base_model or recipe.base_model
        built = retokenised(part.vocabulary, models, merged, base, template, recipe.seed)
        models, rows, files, tokens = built.models, built.rows, dict(built.files), built.tokenizer
        warnings += built.warnings
    if template is not None:
        tokens = tokens or read_tokenizer(models[donor].checkpoint)
        files = files or _with_template(tokens, template)
        special = tokens.settings.get(_SETTINGS, {}) if tokens is not None else {}
        if tokens is None:
            warnings.append(f"chat_template: {donor} has no tokenizer that could use it")
        is_models = part.vocabulary is None and template == stored_template(models[donor].checkpoint)
        warnings += check_template(
            template,
            None if tokens is None or is_models else tokens.ids,
            bos=_content(special.get("bos_token")),
            eos=_content(special.get("eos_token")),
            where="chat_template",
        )
    source = None if part.vocabulary is None else part.vocabulary.source
    keeps_templates = template is None and (source == donor or not isinstance(source, ModelReference))
    return OutputTokenizer(models, part.vocabulary is not None, rows, files, template, keeps_templates, warnings)


def part_on_tokens(recipe: DenseRecipe | MoeRecipe) -> DenseRecipe | MoeRecipe:
    """The part of a recipe that says what tokenizer it is to be: a mixture's backbone, if that does."""
    backbone = recipe.backbone if isinstance(recipe, MoeRecipe) else None
    if backbone is not None and (backbone.vocabulary is not None or backbone.chat_template is not None):
        return backbone
    return recipe


def _template(wanted: str, models: Sequence[Model]) -> tuple[str | None, list[str]]:
    """The chat template that a recipe asks for; None if it is to be the models' and none has one."""
    if wanted.strip() != AUTO:
        return chat_template_of(wanted, where="chat_template", read_file=_read_template), []
    found = most_common([model.checkpoint for model in models])
    return (None, ["chat_template: no model has a chat template"]) if found is None else found


def _read_template(path: str) -> str:
    """A file's text, or as much of it as shows that it is too large."""
    with Path(path).open("rb") as file:
        return file.read(MAX_TEMPLATE_BYTES + 1).decode()


def _with_template(tokens: Tokenizer | None, template: str) -> dict[str, str]:
    """The donor's tokenizer with another template, in a file of its own."""
    files = {FILE_NAME: template}
    settings = None if tokens is None else tokens.settings.get(_SETTINGS)
    if settings is not None:
        rest = {key: value for key, value in settings.items() if key != "chat_template"}
        files[_SETTINGS] = json.dumps(rest, indent=2, ensure_ascii=False) + "\n"
    return files


def _content(token: object) -> str | None:
    """The text of a special token, which settings give as text or with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def check_tokenizers(
    donor: Model, models: Sequence[Model], experts: Sequence[Model], num_rows: int, *, ignore: bool = False
) -> list[str]:
    """Check that rows which are merged are the same tokens' rows.

    Args:
        donor: whose tokenizer the output gets.
        models: whose rows are in the output.
        experts: models of which only layers are, which get the donor's tokens.
        num_rows: of the output's embedding.
        ignore: warn, in place of an error.

    Returns:
        Warnings.

    Raises:
        PlanError: an id is one token in one model's tokenizer, and another in another's.
        CheckpointError, StorageError: a tokenizer could not be read.
    """
    sharing = {model.key: model for model in (donor, *models, *experts) if _has_tokenizer(model)}
    warnings: list[str] = []
    read: dict[str, Tokenizer | None] = {}

    def tokens_of(model: Model) -> Tokenizer | None:
        if model.key in read:
            return read[model.key]
        read[model.key] = None
        why = "it has no tokenizer.json"  # transformers could make one, and takes longer than a small merge
        if TOKENIZER in tokenizer_files(model.checkpoint):
            try:
                read[model.key] = read_tokenizer(model.checkpoint)
            except ModelError as error:
                why = f"{error.where}: {error.what}"
        if read[model.key] is None:
            warnings.append(
                f"the tokenizer of {model.reference} cannot be compared with others, so an id may be a different token "
                f"there: {why}"
            )
        return read[model.key]

    known: list[Model] = []
    for model in sharing.values():
        if not any(_has_same_files(other, model) for other in known):
            for other in known:
                warnings += _compared((other, tokens_of(other)), (model, tokens_of(model)), num_rows, ignore=ignore)
            known.append(model)
    return warnings


def _has_same_files(one: Model, two: Model) -> bool:
    try:
        return same_files(one.checkpoint, two.checkpoint)
    except ModelError:
        return False  # reading it reports what is wrong


def _compared(
    one: tuple[Model, Tokenizer | None], two: tuple[Model, Tokenizer | None], num_rows: int, *, ignore: bool
) -> list[str]:
    """Warnings of how two models' tokens differ.

    Raises:
        PlanError: an id is another token in each, unless that is to be ignored.
    """
    (model, tokenizer), (other, theirs) = one, two
    if tokenizer is None or theirs is None or (told := difference(tokenizer, theirs, num_rows)) is None:
        return []
    warnings = _merged_with_padding((model, tokenizer, told.only_a), (other, theirs, told.only_b))
    if not told.num_other:
        return warnings
    message = _other_tokens(model.reference, told)
    if not ignore:
        raise PlanError(
            message,
            where=f"model {other.reference}",
            remedy="bring the models to common tokens: `tokenizer: {source: union}` or, if they cannot be united, "
            "`tokenizer: {source: MODEL, approximate: omp}`; or pass "
            "`options=MergeOptions(unsafe_ignore_tokenizers=True)` to merge rows of different tokens",
        )
    return [*warnings, f"{other.reference}: {message}"]


def _other_tokens(donor: ModelReference, told: Difference) -> str:
    examples = "; ".join(f"{number} is {ours!r} and {theirs!r}" for number, ours, theirs in told.examples)
    ids = "1 id means another token" if told.num_other == 1 else f"{told.num_other} ids mean other tokens"
    return f"{ids} than in {donor}: {examples}"


def _merged_with_padding(*sides: tuple[Model, Tokenizer, Sequence[int]]) -> list[str]:
    """Warnings of tokens whose rows are merged with rows that are no token's in the other model.

    Args:
        sides: of both models the model, its tokenizer, and the ids that only it has.
    """
    rows = min(_num_rows(model) for model, _, _ in sides)
    found = []
    for (model, tokenizer, only), (other, _, _) in (sides, sides[::-1]):
        numbers = [number for number in only if number < rows]
        if numbers:
            tokens = "1 token" if len(numbers) == 1 else f"{len(numbers)} tokens, the first"
            found.append(
                f"{model.reference} has {tokens} {tokenizer.names()[numbers[0]]!r}, where {other.reference} has "
                "padding, and their rows are merged: `tokenizer: {source: union}` keeps the token's row"
            )
    return found


def _has_tokenizer(model: Model) -> bool:
    return any(is_vocabulary_file(name) for name in tokenizer_files(model.checkpoint))


def _num_rows(model: Model) -> int:
    embedding = model.anatomy.embedding
    return 0 if embedding is None else model.weights.specs[embedding].shape[0]
