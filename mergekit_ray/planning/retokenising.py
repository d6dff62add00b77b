"""The tokens that a recipe asks for, models seen with a row for each, and the files of their tokenizer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from mergekit_ray.architectures.anatomy import anatomy, language_config, stating
from mergekit_ray.checkpoint.token_ids import names_tokens
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.tokenizer import ModelTokenEmbedding, TokenizerOptions, TokenSource, ZeroEmbedding
from mergekit_ray.config.transplant import TransplantOptions
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import nearest
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.token_rows import NO_ROW, Holder, RetokenisedWeights, Row, TokenRows
from mergekit_ray.planning.transplant.rows import transplanted
from mergekit_ray.planning.transplant.tokens import Tokens, few_shared, tokens_of
from mergekit_ray.tokenizers.chat.templates import stored_template
from mergekit_ray.tokenizers.files import shown
from mergekit_ray.tokenizers.reading import Tokenizer, read_tokenizer
from mergekit_ray.tokenizers.uniting import united, with_tokens
from mergekit_ray.tokenizers.writing import files_of, remapped_ids

_MAX_NAMED: Final = 3
_GENERATION: Final = "generation_config.json"
_TABLE: Final = re.compile(r"(embed_tokens|word_embeddings?|tok_embeddings|wte)[^.]*\.weight$")
"""Embeddings of tokens, whatever they are for."""


@dataclass(frozen=True)
class Retokenised:
    """Models that all have the same tokens.

    Attributes:
        models: by reference, those that are merged with a row for each token.
        tokenizer: the tokens.
        rows: of every embedding; None if the models already are like that.
        files: of the tokenizer, by name; empty if the donor's can be copied.
        warnings: what the user should know.
    """

    models: Mapping[ModelReference, Model]
    tokenizer: Tokenizer
    rows: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def retokenised(
    options: TokenizerOptions,
    models: Mapping[ModelReference, Model],
    merged: Sequence[ModelReference],
    base: ModelReference | None,
    template: str | None,
    seed: int,
) -> Retokenised:
    """See models with the tokens that a recipe asks for.

    Args:
        options: the recipe's.
        models: every model that it names.
        merged: those that are merged, and the donor, which comes first.
        base: the recipe's base model.
        template: the chat template that the recipe asks for; None for that of the tokenizer's model.
        seed: of random rows.

    Raises:
        ModelError: a model without a tokenizer, or with one that does not go with the others'.
        PlanError: a token that no model has a row for, or a source that does not have it.
        CheckpointError, StorageError: a tokenizer could not be read.
    """
    return _Retokenising(options, models, merged, base, seed).run(template)


class _Retokenising:
    def __init__(
        self,
        options: TokenizerOptions,
        models: Mapping[ModelReference, Model],
        merged: Sequence[ModelReference],
        base: ModelReference | None,
        seed: int,
    ) -> None:
        self._options = options
        self._stored = self._models = models
        self._merged = merged
        self._base = base
        self._donor = merged[0]
        self._like = options.source if isinstance(options.source, ModelReference) else self._donor
        self._tokenizers = {reference: self._read(reference) for reference in self._read_from()}
        for reference in merged:
            _check_rows(models[reference])
        self._approximated: dict[ModelReference, Tokens] = {}
        if options.approximate is not None:
            self._approximate(replace(options.approximate, seed=seed))

    def run(self, template: str | None) -> Retokenised:
        target = self._with_given(self._target())
        tokens = self._tokens(target)
        holders = self._holders()
        places = {reference: place for place, reference in enumerate(holders)}
        stored = self._stored_holders(holders)
        everyone = [*holders.values(), *stored.values()]
        of_given = places | {reference: len(holders) + i for i, reference in enumerate(stored)}
        given = {
            token: self._given(token, entry.source, {**holders, **stored}, of_given)
            for token, entry in self._entries.items()
            if entry.source is not None
        }
        forced = frozenset(token for token, entry in self._entries.items() if entry.force)
        base = None if self._base is None else places.get(self._base)
        chosen = TokenRows(tokens, everyone, base, places[self._donor], given, forced)
        self._check_all_given(chosen)
        models = dict(self._models)
        for reference in self._merged:
            if reference in places:
                models[reference] = self._seen(reference, chosen, places, target)
        is_donors = target is self._tokenizers[self._donor]
        if is_donors and all(models[reference] is self._models[reference] for reference in self._merged):
            return Retokenised(models, target, warnings=self._warnings())
        files = {} if is_donors else self._files(target, template)
        return Retokenised(models, target, len(tokens), files, self._warnings())

    # -- tokens ---------------------------------------------------------------------------------------------------

    def _target(self) -> Tokenizer:
        """The tokenizer that was asked for."""
        if self._options.source == "union":
            return united([self._tokenizers[reference] for reference in self._merged])
        return self._tokenizers[self._like]

    @property
    def _entries(self) -> Mapping[str, Any]:
        return self._options.tokens or {}

    def _with_given(self, target: Tokenizer) -> Tokenizer:
        """With the tokens that the recipe gives a row which is not that of the same token."""
        new = [token for token in self._entries if token not in target.ids]
        for token in new:
            source = self._entries[token].source
            if not isinstance(source, ZeroEmbedding | ModelTokenEmbedding):
                known = sorted(target.ids)
                raise PlanError(
                    f"{token!r} is no token of the tokenizer{nearest(token, known)}",
                    where="tokenizer.tokens",
                    remedy="say what its row is to be: `source: {kind: model_token, model: ..., token: ...}` or "
                    "`source: {kind: zero}`",
                )
        return with_tokens(target, new) if new else target

    def _tokens(self, target: Tokenizer) -> list[str | None]:
        """Each row's token. There are as many rows as the tokenizer's model has, if that is enough."""
        size = 1 + max(target.ids.values(), default=-1)
        factor = self._options.pad_to_multiple_of
        size = max(size, _num_rows(self._models[self._like])) if factor is None else -(-size // factor) * factor
        names = target.names()
        return [names.get(number) for number in range(size)]

    # -- rows -----------------------------------------------------------------------------------------------------

    def _approximate(self, options: TransplantOptions) -> None:
        """See models that lack tokens of the tokenizer's model as `transplant` would leave them."""
        donor, seen = self._models[self._like], dict(self._models)
        for reference in self._merged:
            model = self._models[reference]
            tokens = tokens_of(model, donor, options)
            whole = list(range(_num_rows(model)))
            if reference != self._like and not tokens.embedding.chosen == tokens.head.chosen == whole:
                seen[reference] = transplanted(model, donor, tokens, options, model.checkpoint.config)
                self._approximated[reference] = tokens
        self._models = seen

    def _rows_by_token(self, reference: ModelReference) -> Mapping[str, int]:
        """A model's tokens that have a row. One that the recipe gives a row is not approximated before."""
        tokens = self._approximated.get(reference)
        if tokens is None:
            return self._tokenizers[reference].ids
        own = {row for _, row in tokens.embedding.shared}
        given = {token for token, entry in self._entries.items() if entry.source is not None}
        return {token: row for token, row in tokens.donor.ids.items() if row in own or token not in given}

    def _holders(self) -> dict[ModelReference, Holder]:
        """Models that have rows as wide as the donor's."""
        wanted = _width(self._models[self._donor])
        return {
            reference: _holder(model, self._rows_by_token(reference), is_merged=reference in self._merged)
            for reference in self._tokenizers
            if _width(model := self._models[reference]) == wanted
        }

    def _stored_holders(self, holders: Mapping[ModelReference, Holder]) -> dict[ModelReference, Holder]:
        """Approximated models as they are stored, where the recipe names a token or an id of theirs."""
        named = self._approximated.keys() & holders.keys() & set(self._options.model_references())
        return {each: _holder(self._stored[each], self._tokenizers[each].ids, is_merged=False) for each in named}

    def _warnings(self) -> list[str]:
        """Of models with little in common, and of ids beyond the rows, which nobody could use."""
        found = [
            f"{reference}: {told}" for reference, tokens in self._approximated.items() for told in few_shared(tokens)
        ]
        for reference in self._merged:
            tokens, rows = self._tokenizers[reference].names(), _num_rows(self._stored[reference])
            lost = sorted(number for number in tokens if number >= rows)
            if lost:
                beyond = (
                    f"{counted(len(lost), 'token')} with an id beyond them, first {shown(tokens[lost[0]])} ({lost[0]})"
                )
                found.append(
                    f"{reference} has {counted(rows, 'row')}, and {beyond}: it is merged as a model that lacks them"
                )
        return found

    def _given(
        self,
        token: str,
        source: TokenSource,
        holders: Mapping[ModelReference, Holder],
        places: Mapping[ModelReference, int],
    ) -> Row:
        """The row that the recipe names."""
        if isinstance(source, ZeroEmbedding):
            return NO_ROW
        is_same = isinstance(source, ModelReference)
        reference = source if isinstance(source, ModelReference) else source.model
        where = f"tokenizer.tokens, {token!r}"
        if reference not in holders:
            raise PlanError(
                f"{reference} has no rows as wide as those of {self._donor}",
                where=where,
                remedy="name a model of the same hidden size",
            )
        holder = holders[reference]
        wanted = token if isinstance(source, ModelReference) else source.token
        if wanted is None:
            number = cast(ModelTokenEmbedding, source).token_id
            assert number is not None
            if number >= holder.num_rows:
                raise PlanError(
                    f"token_id {number} is beyond the {counted(holder.num_rows, 'row')} of {reference}",
                    where=where,
                    remedy=f"name a token of it, or an id below {holder.num_rows}",
                )
        elif wanted in holder.ids:
            number = holder.ids[wanted]
        else:
            raise PlanError(
                f"{reference} has no token {wanted!r}{nearest(wanted, holder.ids)}",
                where=where,
                remedy="name a model that has the token"
                if is_same
                else "name a token that it has, or give its id as `token_id`",
            )
        return (places[reference],), (number,)

    def _check_all_given(self, chosen: TokenRows) -> None:
        lost = chosen.without_source
        if lost:
            knows = next(reference for reference, tokenizer in self._tokenizers.items() if lost[0] in tokenizer.ids)
            ids, rows = self._tokenizers[knows].ids, _num_rows(self._models[knows])
            lost = [token for token in lost if token in ids]
            named = ", ".join(map(shown, lost[:_MAX_NAMED])) + (", ..." if len(lost) > _MAX_NAMED else "")
            itself = f", which itself has {counted(rows, 'row')} only" if ids[lost[0]] >= rows else ""
            raise PlanError(
                f"no model has a row for {counted(len(lost), 'token')} of the tokenizer of {knows}{itself}: {named}",
                where="tokenizer",
                remedy="merge a model that has them, or say under `tokens` where their rows come from",
            )

    def _seen(
        self, reference: ModelReference, chosen: TokenRows, places: Mapping[ModelReference, int], target: Tokenizer
    ) -> Model:
        """A model with a row for each token; itself if it is like that."""
        model, place = self._models[reference], places[reference]
        own = chosen.of(place)
        head = self._head_to_untie(model)
        is_itself = len(own) == _num_rows(model) and all(row == ((place,), (i,)) for i, row in enumerate(own))
        config = self._config(reference, target, len(own))
        if is_itself and config == model.checkpoint.config:
            return model
        weights = RetokenisedWeights(model, [holder.model for holder in chosen.holders], own, head)
        if head is not None:
            for part in [config, *stating(config, "tie_word_embeddings")]:
                part["tie_word_embeddings"] = False
        parts = anatomy(weights.specs, config, f"model {reference}")
        return replace(model, weights=weights, checkpoint=replace(model.checkpoint, config=config), anatomy=parts)

    def _head_to_untie(self, model: Model) -> str | None:
        """What to call the head of a tied model beside one that has a head of its own.

        A token that it lacks has two rows there, and gets both.
        """
        if not model.anatomy.tied or model.anatomy.head is not None or model.anatomy.redundant:
            return None
        heads = [self._models[reference].anatomy.head for reference in self._merged]
        return next(filter(None, heads), None)

    # -- files ----------------------------------------------------------------------------------------------------

    def _config(self, reference: ModelReference, target: Tokenizer, rows: int) -> dict[str, Any]:
        """A model's config for so many rows, and the donor's with the ids of the new tokenizer."""
        config = self._models[reference].checkpoint.config
        changed = copy.deepcopy(self._remapped(config, target) if reference == self._donor else dict(config))
        for part in stating(changed, "vocab_size") or [cast(dict[str, Any], language_config(changed))]:
            part["vocab_size"] = rows
        return changed

    def _remapped(self, config: Mapping[str, Any], target: Tokenizer, *, is_generation: bool = False) -> dict[str, Any]:
        """The donor's config, or its generation config, with the ids of the new tokenizer.

        What begins and ends a text is what the tokenizer's own model says in its configs, or else its tokenizer.
        """
        kept: dict[str, Any] = {}
        if self._like != self._donor:
            own = self._models[self._like].checkpoint.config
            generation = self._tokenizers[self._like].settings.get(_GENERATION, {}) if is_generation else {}
            for key in filter(names_tokens, config):
                said = (each.get(key) for each in (generation, own, language_config(own), target.special))
                if (value := next((each for each in said if each is not None), None)) is not None:
                    kept[key] = copy.deepcopy(value)
        rest = {key: value for key, value in config.items() if key not in kept}
        changed = {**remapped_ids(rest, self._tokenizers[self._donor], target), **kept}
        return {key: changed[key] for key in config}

    def _files(self, target: Tokenizer, template: str | None) -> dict[str, str]:
        template = template or stored_template(self._models[self._like].checkpoint)
        files = files_of(target, chat_template=template)
        files.pop(_GENERATION, None)
        settings = self._tokenizers[self._donor].settings.get(_GENERATION)
        if settings is not None:
            remapped = self._remapped(settings, target, is_generation=True)
            files[_GENERATION] = json.dumps(remapped, indent=2, ensure_ascii=False) + "\n"
        return files

    # -- models ---------------------------------------------------------------------------------------------------

    def _read_from(self) -> Collection[ModelReference]:
        """Models whose tokenizers are needed: those that are merged, and those that rows or the tokens come from."""
        return dict.fromkeys([*self._merged, *self._options.model_references()])

    def _read(self, reference: ModelReference) -> Tokenizer:
        found = read_tokenizer(self._models[reference].checkpoint)
        if found is None:
            raise ModelError(
                "there is no tokenizer beside the model, and the recipe asks for common tokens",
                where=f"model {reference}",
                remedy="copy the tokenizer's files to the model, or remove `tokenizer` and `tokenizer_source`",
            )
        return found


def _holder(model: Model, ids: Mapping[str, int], *, is_merged: bool) -> Holder:
    rows = _num_rows(model)
    return Holder(model, {token: number for token, number in ids.items() if number < rows}, rows, is_merged)


def _check_rows(model: Model) -> None:
    """Check that a row of the embedding and one of the head are one token's."""
    parts, specs = model.anatomy, model.weights.specs
    if parts.embedding is None:
        raise ModelError(
            "the model has no embedding whose rows could be put in another order",
            where=f"model {model.reference}",
            remedy="remove `tokenizer` and `tokenizer_source`",
        )
    if parts.head is not None and specs[parts.head].shape[0] != specs[parts.embedding].shape[0]:
        raise ModelError(
            f"embedding and head have {specs[parts.embedding].shape[0]} and {specs[parts.head].shape[0]} rows, so that "
            "not each row is a token's",
            where=f"model {model.reference}",
            remedy="remove `tokenizer` and `tokenizer_source`: the tokenizer is copied as it is",
        )

    more = [n for n in (*parts.before, *parts.after) if _TABLE.search(n) and n not in parts.vocabulary]
    if more:
        raise ModelError(
            f"{more[0]} has a row for each token beside the embedding, and is of another shape",
            where=f"model {model.reference}",
            remedy="remove `tokenizer` and `tokenizer_source`: the tokenizer is copied as it is",
        )


def _num_rows(model: Model) -> int:
    if model.anatomy.embedding is None:
        raise ModelError(
            "the model has no embedding, so its tokens have no rows",
            where=f"model {model.reference}",
            remedy="name a language model",
        )
    return model.weights.specs[model.anatomy.embedding].shape[0]


def _width(model: Model) -> tuple[int, ...] | None:
    parts = model.anatomy
    return None if parts.embedding is None else model.weights.specs[parts.embedding].shape[1:]
