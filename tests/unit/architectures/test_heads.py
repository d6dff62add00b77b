"""The names of heads that files do not hold, against the classes of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto

from mergekit_ray.architectures.heads import lacks_head, may_have_head, unstored_head

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")


def tied_classes() -> Iterator[tuple[str, str, str]]:
    """Every class that transformers ties: its name, its embedding and its head."""
    for mapping in MAPPINGS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in [names] if isinstance(names, str) else names:
                tied: Any = getattr(getattr(transformers, name, None), "_tied_weights_keys", None)
                for head, embedding in (tied if isinstance(tied, dict) else {}).items():
                    if "embed" in embedding or "wte" in embedding or "shared" in embedding:
                        yield name, embedding, head


def test_no_class_of_transformers_calls_its_head_something_else() -> None:
    found = [(name, head, unstored_head(embedding, {"architectures": [name]})) for name, embedding, head in CLASSES]
    heads = {name: head for name, head, _ in found if "embed_tokens" not in head}
    heads["GPTNeoXForCausalLM"] = "embed_out.weight"  # as its files have it, whatever the module is called
    assert [entry for entry in found if entry[2] not in (None, entry[1], heads[entry[0]])] == []
    assert sum(named is not None for _, _, named in found) > 200


CLASSES = list(tied_classes())


@pytest.mark.parametrize(
    ("embedding", "class_name", "head"),
    [
        ("model.embed_tokens.weight", "LlamaForCausalLM", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "LlavaForConditionalGeneration", "language_model.lm_head.weight"),
        ("transformer.wte.weight", "GPT2LMHeadModel", "lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "OPTForCausalLM", "lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "WhisperForConditionalGeneration", None),
        ("gpt_neox.embed_in.weight", "GPTNeoXForCausalLM", "embed_out.weight"),
        ("model.embed_tokens.weight", "MistralModel", None),
        ("bert.embeddings.word_embeddings.weight", "BertForMaskedLM", None),
        ("text_model.embeddings.token_embedding.weight", "CLIPModel", None),
    ],
)
def test_names(embedding: str, class_name: str, head: str | None) -> None:
    assert unstored_head(embedding, {"architectures": [class_name]}) == head


def test_without_a_class_the_embedding_decides() -> None:
    assert unstored_head("model.embed_tokens.weight", {}) == "lm_head.weight"
    assert unstored_head("embeddings.word_embeddings.weight", {"architectures": None}) is None
    assert unstored_head(None, {}) is None


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["BertModel"], False),
        (["XLMRobertaForSequenceClassification"], False),
        (["GPT2LMHeadModel"], True),
        (["BertForMaskedLM"], True),
        ([], True),
        (None, True),
    ],
)
def test_models_without_logits_have_no_head(classes: list[str] | None, expected: bool) -> None:
    assert may_have_head({"architectures": classes}) is expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["RobertaForSequenceClassification"], True),
        (["BertForQuestionAnswering"], True),
        (["Qwen2ForRewardModel"], True),
        (["BertModel"], True),
        (["LlamaForCausalLM"], False),
        (["GPT2LMHeadModel"], False),
        (["InternVLChatModel"], False),  # holds a whole language model
        (["BertForSequenceClassification", "BertForMaskedLM"], False),
        (["SomethingElse"], False),
        ([], False),
        (None, False),
    ],
)
def test_which_classes_are_known_to_have_no_head_over_the_vocabulary(classes: object, expected: bool) -> None:
    assert lacks_head({"architectures": classes}) is expected
