"""The output projection of a model whose files hold none because it is the embedding: whether there is one, its name.

Names are those of transformers' classes, which an untied output has to follow. Where neither the embedding's name nor
the class tells the name, none is made up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WITH_PLAIN_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the classes that call their head ``lm_head`` if they call their embedding as below."""

_WITH_HEAD = (*_WITH_PLAIN_HEAD, "ForMaskedLM", "WithLMHead", "ForPreTraining", "MTModel")
"""Endings of the classes that give logits over the vocabulary."""

_WITHOUT_HEAD = re.compile(r"(Classification|QuestionAnswering\w*|MultipleChoice|Prediction|Reward|(?<!Chat)Model)$")
"""Endings of the classes that have other heads, or none."""

_PLAIN_EMBEDDING = re.compile(
    r"(?P<outer>language_model\.)?(model\.|model\.language_model\.|model\.text_model\.)?embed_tokens\.weight"
    r"|(?P<neox>gpt_neox\.embed_in\.weight)"
    r"|(?P<opt>(model\.)?decoder\.embed_tokens\.weight)"
    r"|(transformer\.)?(wte|word_embeddings)\.weight"
    r"|(model\.|model\.language_model\.)?shared\.weight"
    r"|backbone\.embeddings\.weight"
)


def unstored_head(embedding: str | None, config: Mapping[str, Any]) -> str | None:
    """What a tied model's head would be called if it were stored; None where nothing tells.

    Args:
        embedding: the stored name of its input embedding.
        config: its ``config.json``. Without ``architectures`` the name alone decides.
    """
    found = None if embedding is None else _PLAIN_EMBEDDING.fullmatch(embedding)
    classes = classes_of(config)
    if found is None or (classes and not any(name.endswith(_WITH_PLAIN_HEAD) for name in classes)):
        return None
    if found["opt"] and classes != ["OPTForCausalLM"]:
        return None  # decoders of pairs have heads of many names
    return "embed_out.weight" if found["neox"] else f"{found['outer'] or ''}lm_head.weight"


def may_have_head(config: Mapping[str, Any]) -> bool:
    """Whether a model may have a head: its class gives logits over the vocabulary, or is not named."""
    classes = classes_of(config)
    return not classes or any(name.endswith(_WITH_HEAD) for name in classes)


def lacks_head(config: Mapping[str, Any]) -> bool:
    """Whether a model's class is known to have no head over the vocabulary: it classifies, or ends with its layers."""
    classes = classes_of(config)
    return bool(classes) and not may_have_head(config) and all(_WITHOUT_HEAD.search(name) for name in classes)


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The classes of transformers that a config names as the model's (``architectures``); empty if it names none."""
    found = config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []
