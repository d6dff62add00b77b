"""One tokenizer out of several: the first one's, with the tokens of the others that it lacks.

Its own tokens keep their ids. New merges of a BPE come after all of its own and make new tokens only, so that a text is
first split as the first tokenizer splits it, and then runs of tokens are joined to new ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.tokenizers.files import ADDED, CONFIG, FLAGS, MAX_IDS, TOKENIZER, fail, shown
from mergekit_ray.tokenizers.reading import Tokenizer

_PARTS: Final = ("normalizers", "pretokenizers", "decoders")


def united(tokenizers: Sequence[Tokenizer]) -> Tokenizer:
    """The union of tokenizers.

    The first one's tokens keep their ids. The others' new ones follow in the models' order, those of a model in the
    order of their ids: tokens of a model's vocabulary go into the vocabulary (a Unigram's pieces with their scores, a
    BPE's with the merges that make them and whose parts are there), added tokens stay added tokens with their flags.
    Whatever else there is (normalizer, pre-tokenizer, post-processor, decoder, settings) is the first one's.

    Raises:
        ModelError: two are of different kinds, or write text into tokens in different ways; or a merge is not of
            tokens.
    """
    result, *others = tokenizers
    for other in others:
        _check_alike(result, other)
        result = _joined(result, other)
    return result


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer that has all of ``tokens``: those that it lacks are added, as plain text, with the next ids.

    Raises:
        PlanError: one is empty.
    """
    if "" in tokens:
        raise PlanError(
            "the empty text cannot be a token", where=tokenizer.reference, remedy="leave it out of `tokens`"
        )
    plain = dict.fromkeys(FLAGS, False)
    new = {text: {"content": text, **plain} for text in tokens if text not in tokenizer.ids}
    return _extended(tokenizer, new, new) if new else tokenizer


def settled(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with every token in ``tokenizer.json``, so that no other file is needed to know its id."""
    listed = {token["content"] for token in tokenizer.data.get("added_tokens") or ()}
    return tokenizer if tokenizer.added.keys() <= listed else _extended(tokenizer, (), {})


def _joined(first: Tokenizer, other: Tokenizer) -> Tokenizer:
    new = sorted(other.ids.keys() - first.ids.keys(), key=other.ids.__getitem__)
    added = {text: token for text, token in other.added.items() if text not in first.added}
    if not new and not added:
        return first
    pieces = set(new) - other.added.keys()
    if first.kind == "Unigram":
        scores = {piece: score for piece, score in other.data["model"]["vocab"] if piece in pieces}
        return _extended(first, new, added, scores=scores)
    merges = _new_merges(first, other, pieces) if first.kind == "BPE" and pieces else []
    return _extended(first, new, added, merges=merges)


def _extended(
    first: Tokenizer,
    new: Iterable[str],
    added: Mapping[str, Mapping[str, Any]],
    *,
    scores: Mapping[str, float] | None = None,
    merges: Sequence[Any] = (),
) -> Tokenizer:
    """A tokenizer with more tokens.

    Args:
        first: the tokenizer.
        new: tokens that it lacks, which get the next ids in this order.
        added: which of these and of its own become added tokens, with their flags; the rest goes into the vocabulary.
        scores: of a Unigram, those of the new pieces.
        merges: to be appended to a BPE's.
    """
    next_id = max(first.ids.values(), default=-1) + 1
    ids = {**first.ids, **{token: number for number, token in enumerate(new, start=next_id)}}
    if len(ids) > MAX_IDS or max(ids.values()) >= MAX_IDS:
        fail(f"the tokenizer would have more than {MAX_IDS} tokens", first.reference)
    tokens = {**first.added, **{text: {**token, "id": ids[text]} for text, token in added.items()}}
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]["id"]))
    own = first.data["model"]["vocab"]
    more = {token: ids[token] for token in new if token not in tokens}
    # Whoever loads the file numbers added tokens that the vocabulary lacks from its length on, whatever the file says.
    outside = {text: ids[text] for text in tokens if text not in first.vocabulary}
    length = len(own) + len(more)
    if list(outside.values()) != list(range(length, length + len(outside))):
        more |= outside
    model = {**first.data["model"], "type": first.kind}
    if more and first.kind == "Unigram":
        lowest = min(score for _, score in own)  # so that an added token is no reason to split a text otherwise
        pieces = sorted(more, key=more.__getitem__)
        model["vocab"] = [*own, *([piece, (scores or {}).get(piece, lowest)] for piece in pieces)]
    elif more:
        model["vocab"] = dict(sorted((own | more).items(), key=lambda item: item[1]))
    if merges:
        model["merges"] = _appended(model["merges"], merges)
    entries = [
        {"id": ids[text], "content": text, **{flag: token[flag] for flag in FLAGS}} for text, token in tokens.items()
    ]
    data = {**first.data, "added_tokens": entries, "model": model}
    return Tokenizer(first.reference, first.kind, data, _settings(first.settings, entries))


def _appended(merges: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """Merges in the form of the first ones, ``"a b"`` or ``["a", "b"]``; a part with a space needs the second."""
    of_text = set(map(type, merges)) <= {str}
    if of_text and not any(isinstance(merge, list) and " " in merge[0] + merge[1] for merge in more):
        return [*merges, *(merge if isinstance(merge, str) else " ".join(merge) for merge in more)]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in (*merges, *more)]


def _settings(
    settings: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Settings that list all added tokens where they listed some."""
    found = {name: value for name, value in settings.items() if name != ADDED}
    if isinstance(found.get(CONFIG, {}).get("added_tokens_decoder"), Mapping):
        decoder = {str(token["id"]): {key: token[key] for key in ("content", *FLAGS)} for token in entries}
        found[CONFIG] = {**found[CONFIG], "added_tokens_decoder": decoder}
    return found


def _new_merges(first: Tokenizer, other: Tokenizer, new: set[str]) -> list[Any]:
    """Merges of the other one that make a new token of tokens that both or the union have, in its order."""
    _merges(first)  # a damaged one is found here rather than by whoever loads the result
    known = first.vocabulary.keys() | new
    merges = zip(other.data["model"]["merges"], *_merges(other), strict=True)
    return [merge for merge, left, right, made in merges if made in new and left in known and right in known]


def _merges(tokenizer: Tokenizer) -> tuple[list[str], list[str], list[str]]:
    """Left and right part of each merge, and what it makes.

    Raises:
        ModelError: one of them is no token.
    """
    model, vocabulary = tokenizer.data["model"], tokenizer.vocabulary
    merges: list[Any] = model["merges"]
    if set(map(type, merges)) == {str}:  # all at once, which is much faster than one by one
        halves = " ".join(merges).split(" ")
        left, right = halves[::2], halves[1::2]
    else:
        left, right = ([merge[side] for merge in merges] for side in (0, 1))
    cut = len(model.get("continuing_subword_prefix") or "")
    made = list(map(operator.add, left, [part[cut:] for part in right] if cut else right))
    for parts in (left, right, made):
        if not all(map(vocabulary.__contains__, parts)):
            at = next(at for at, part in enumerate(parts) if part not in vocabulary)
            fail(
                f"a merge joins {shown(left[at])} and {shown(right[at])}, but the vocabulary has no {shown(parts[at])}",
                f"{tokenizer.reference}: {TOKENIZER}",
            )
    return left, right, made


def _check_alike(first: Tokenizer, other: Tokenizer) -> None:
    """See that the same text of a token means the same in both."""
    if manner(first) != manner(other):
        raise ModelError(
            f"the tokenizers cannot be united: that of {first.reference} is {_described(first)}, that of "
            f"{other.reference} is {_described(other)}",
            remedy="give all models the tokenizer of one: `tokenizer: {source: MODEL}`, or merge models of one family",
        )


def manner(tokenizer: Tokenizer) -> tuple[str, bool, str, str, str]:
    """How a tokenizer writes text: kind, whether by bytes, what a space becomes, marks within and at ends of words."""
    model, data = tokenizer.data["model"], tokenizer.data
    parts = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _flat(data.get(key))]
    by_bytes = any(part.get("type") == "ByteLevel" for part in parts)
    space = next(filter(None, map(_space, parts)), "")
    within = model.get("continuing_subword_prefix") or ""
    return tokenizer.kind, by_bytes, space, within, model.get("end_of_word_suffix") or ""


def _described(tokenizer: Tokenizer) -> str:
    kind, by_bytes, space, within, end = manner(tokenizer)
    marks = [
        f"writes spaces as {shown(space)}" if space else "",
        f"begins what goes on within a word with {shown(within)}" if within else "",
        f"ends words with {shown(end)}" if end else "",
    ]
    said = " and ".join(filter(None, marks))
    fallback = " with byte fallback" if tokenizer.data["model"].get("byte_fallback") is True else ""
    return f"a{' byte-level' if by_bytes else ''} {kind}{fallback}{f' that {said}' if said else ''}"


def _flat(part: Any) -> Iterator[Mapping[str, Any]]:
    """A step, or those of a sequence."""
    if isinstance(part, Mapping):
        yield part
        for key in _PARTS:
            for inner in part[key] if isinstance(part.get(key), list) else ():
                yield from _flat(inner)


def _space(part: Mapping[str, Any]) -> str:
    """What a step writes for a space, or reads as one; empty if it does neither."""
    match part:
        case {"type": "Metaspace", "replacement": str(mark)}:
            return mark
        case {"type": "Replace", "pattern": {"String": " "}, "content": str(mark)}:
            return mark
        case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "}:
            return mark
    return ""
