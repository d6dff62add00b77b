"""Text as a tokenizer splits it, by the tokenizers library. The only module here that imports that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.tokenizers.files import REMEDY
from mergekit_ray.tokenizers.reading import Tokenizer
from mergekit_ray.tokenizers.spelling import spellings


def pieces_of(model: Tokenizer, donor: Tokenizer, numbers: Sequence[int]) -> dict[int, Sequence[int]]:
    """Of some of a donor's tokens, by id, the tokens of a model that their text is made of.

    A token that is no text by itself, such as a part of a character, is made of the model's tokens for its bytes. What
    the model has no tokens for is left out, and a token of which nothing is left has no pieces.

    Args:
        model: splits the text. Special tokens that it would add are not.
        donor: whose tokens they are.
        numbers: their ids.

    Raises:
        PlanError: the tokenizers library is not installed.
        ModelError: it cannot load the model's tokenizer.
    """
    split = _loaded(model)
    spelt, names = spellings(donor), donor.names()
    of_byte = {
        spelling.data: model.ids[token]
        for token, spelling in spellings(model).items()
        if len(spelling.data) == 1 and not spelling.is_added
    }
    unknown = model.ids.get(str(model.data["model"].get("unk_token") or ""))
    found: dict[int, Sequence[int]] = {}
    for number in numbers:
        data = spelt[names[number]].data
        try:
            pieces = split(data.decode("utf-8"))
        except UnicodeDecodeError:
            pieces = _by_bytes(data, of_byte)
        found[number] = [piece for piece in pieces if piece != unknown]
    return found


def _by_bytes(data: bytes, of_byte: Mapping[bytes, int]) -> list[int]:
    return [of_byte[bytes([byte])] for byte in data if bytes([byte]) in of_byte]


def _loaded(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """A function from text to ids."""
    try:
        import tokenizers  # noqa: PLC0415 - optional
    except ImportError:
        raise PlanError(
            "tokens are split by the tokenizers library, which is not installed",
            remedy="pip install 'mergekit-ray[moe]'",
        ) from None
    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.data))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizers library cannot load the tokenizer: {error}", where=tokenizer.reference, remedy=REMEDY
        ) from error
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)
