"""Two models' headers and tokenizers -> the plan of a transplant. No weight is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergekit_ray.architectures.anatomy import language_config
from mergekit_ray.architectures.quantisation_config import SIDE_FILES
from mergekit_ray.checkpoint.side_files import is_tokenizer_file
from mergekit_ray.checkpoint.token_ids import LISTS, names_tokens, renumbered
from mergekit_ray.config.normal import normalise
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.transplant import TransplantOptions
from mergekit_ray.core.plan import Plan, SideFile
from mergekit_ray.core.registry import METHODS
from mergekit_ray.planning.beside import check_sizes
from mergekit_ray.planning.dense import lower
from mergekit_ray.planning.lowering import Arithmetic, Model
from mergekit_ray.planning.make import inputs_of
from mergekit_ray.planning.output_config import output_config
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.transplant.rows import transplanted
from mergekit_ray.planning.transplant.tokens import Tokens, few_shared, tokens_of
from mergekit_ray.tokenizers.files import GENERATION, tokenizer_files


def transplant_plan(
    model: Model,
    donor: Model,
    options: TransplantOptions,
    hardly_trained: tuple[Collection[int], Collection[int]] = ((), ()),
) -> Plan:
    """Plan a transplant: all tensors are copied but those with a row for each token.

    Args:
        model: that gets new tokens.
        donor: whose tokenizer it gets.
        options: how.
        hardly_trained: see `tokens_of`.

    Raises:
        ModelError, PlanError, CheckpointError, StorageError: see `tokens_of`; or the model's tensors make no sense.
    """
    tokens = tokens_of(model, donor, options, hardly_trained)
    ids = with_donors_ids(model.checkpoint.config, donor, tokens)
    seen = transplanted(model, donor, tokens, options, ids)
    recipe = DenseRecipe.model_validate(
        {"merge_method": "passthrough", "models": [{"model": str(model.reference)}], "seed": options.seed}
    )
    arithmetic = Arithmetic(stored=None, inputs=None, compute=None, seed=options.seed)
    models = {model.reference: seen}
    lowering = lower(normalise(recipe), METHODS.get("passthrough"), models, seen, arithmetic)
    check_sizes(model)
    files = _generation_config(donor, tokens)
    return Plan(
        inputs=inputs_of({model.reference: seen}, lowering.expressions.values()),
        shards=partition(lowering.groups, lowering.expressions, options.max_shard_size),
        config=output_config(
            seen.checkpoint.config,
            layers=None,
            stacks=seen.anatomy.stacks,
            main=seen.anatomy.main,
            dtype=None,
            tied=lowering.tied,
            vocab_size=len(tokens.embedding.chosen),
        ),
        side_files=tuple(_side_files(model, donor, files)),
        recipe={
            "transplant": {"model": str(model.reference), "donor": str(donor.reference), **options.to_data()},
        },
        seed=options.seed,
        generated_files=files,
        dropped=lowering.dropped,
        aliased=lowering.aliased,
        warnings=tuple(dict.fromkeys([*model.checkpoint.warnings, *lowering.warnings, *few_shared(tokens)])),
    )


def with_donors_ids(config: Mapping[str, Any], donor: Model, tokens: Tokens) -> dict[str, Any]:
    """A config of the model's whose ids are of the donor's tokens: those that the donor's config or tokenizer says.

    An id of neither is that of the same token; without such a token it is left out.
    """
    theirs = [donor.checkpoint.config, language_config(donor.checkpoint.config), tokens.donor.special]
    return _renumbered(config, theirs, tokens)


def _renumbered(config: Mapping[str, Any], theirs: Sequence[Mapping[str, Any]], tokens: Tokens) -> dict[str, Any]:
    changed = {}
    for key, value in copy.deepcopy(dict(config)).items():
        if isinstance(value, Mapping):
            changed[key] = _renumbered(value, theirs, tokens)
        elif key in LISTS:
            changed[key] = renumbered(key, value, lambda number: _same_token(number, tokens))
        elif not names_tokens(key) or value is None:
            changed[key] = value
        else:
            said = next((found[key] for found in theirs if found.get(key) is not None), None)
            if said is None:
                said = _same_token(value, tokens)
            if said is not None:
                changed[key] = copy.deepcopy(said)
    return changed


def _same_token(value: Any, tokens: Tokens) -> Any:
    if isinstance(value, list):
        kept = [number for number in (_same_token(each, tokens) for each in value) if number is not None]
        return kept or None
    if type(value) is not int:
        return value
    token = tokens.model.names().get(value)
    return value if value < 0 else None if token is None else tokens.donor.ids.get(token)


def _generation_config(donor: Model, tokens: Tokens) -> dict[str, str]:
    """The model's ``generation_config.json`` with the donor's ids, if it has one."""
    own = tokens.model.settings.get(GENERATION)
    if own is None:
        return {}
    said = {key: value for key, value in tokens.donor.settings.get(GENERATION, {}).items() if names_tokens(key)}
    rest = {key: value for key, value in own.items() if key not in said}
    changed = {**with_donors_ids(rest, donor, tokens), **said}
    return {GENERATION: json.dumps(changed, indent=2, ensure_ascii=False) + "\n"}


def _side_files(model: Model, donor: Model, generated: Mapping[str, str]) -> list[SideFile]:
    """The model's files but for its tokenizer, and the donor's tokenizer."""
    own = [
        side
        for side in model.side_files
        if side.file.name not in SIDE_FILES
        and side.file.name not in generated
        and not is_tokenizer_file(side.file.name)
    ]
    theirs = {side.file.name: side for side in donor.side_files if is_tokenizer_file(side.file.name)}
    wanted = tokenizer_files(donor.checkpoint).keys()
    return [*own, *(file for name, file in theirs.items() if name in wanted)]
