"""Which files beside the weights and the config make a model usable, and so travel with it."""

from __future__ import annotations

import re

CONFIG_NAME = "config.json"
MAX_SIDE_FILE_BYTES = 256 << 20
"""Of one file: they are copied in one piece."""

_TEMPLATE_FOLDER = "additional_chat_templates/"

_WEIGHTS_OR_STATE = re.compile(
    r"""
    .*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|npz|npy|pkl|pickle|tflite|ot)(\..*)?   # weights, states
    | .*\.index(\..+)?\.json                                    # indexes of weights
    | (trainer_state|adapter_config|config)\.json | .*results\.json | training_args.*
    | mergekit.* | readme.* | \..*                              # made anew for the output, or nobody's business
    """,
    re.VERBOSE,
)
_WANTED = re.compile(
    r"""
    .*\.(json|model|tiktoken|spm|jinja|py)
    | tokenizer.* | (vocab|merges|dict|bpe|token|special|added)[^/]*\.(txt|bpe|codes)
    | (licen[sc]e|notice|copying|use_policy)([._-].*)?
    """,
    re.VERBOSE,
)

_VOCABULARY = re.compile(
    r"(tokenizer|vocab|tekken)\.json|vocab[^/]*\.txt|[^/]+\.(model|tiktoken|spm)|tokenizer\.model\..+", re.IGNORECASE
)
_BESIDE_VOCABULARY = re.compile(
    r"(tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja|merges\.txt"
    rf"|{_TEMPLATE_FOLDER}[^/]+\.jinja",
    re.IGNORECASE,
)


def is_vocabulary_file(name: str) -> bool:
    """Whether a file holds a tokenizer's vocabulary, in whatever form."""
    return _VOCABULARY.fullmatch(name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Whether a file is a tokenizer's: its vocabulary, or its settings and chat templates."""
    return is_vocabulary_file(name) or _BESIDE_VOCABULARY.fullmatch(name) is not None


def is_side_file(name: str) -> bool:
    """Whether a file of this name is copied beside merged weights.

    Tokenizer files, generation and processor configs, chat templates, modelling code and licences are. Weights of any
    format, their indexes, ``config.json``, model cards, hidden files, training state and subfolders (but for
    ``additional_chat_templates``) are not. Folders that a model names itself: see `checkpoint.sentence_transformers`.
    """
    lower = name.lower()
    if lower.startswith(_TEMPLATE_FOLDER):
        return "/" not in lower.removeprefix(_TEMPLATE_FOLDER) and lower.endswith(".jinja")
    return "/" not in lower and not _WEIGHTS_OR_STATE.fullmatch(lower) and _WANTED.fullmatch(lower) is not None
