"""Which files beside the weights and the config make a model usable, and so travel with it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergekit_ray.storage.protocols import FileStat

CONFIG_NAME = "config.json"
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
    .*\.(json|model|tiktoken|jinja|py)
    | tokenizer.* | (vocab|merges|dict|bpe|token|special|added)[^/]*\.txt
    | (licen[sc]e|notice|copying|use_policy)([._-].*)?
    """,
    re.VERBOSE,
)


def is_side_file(name: str) -> bool:
    """Whether a file of this name is copied beside merged weights.

    Tokenizer files, generation and processor configs, chat templates, modelling code and licences are. Weights of any
    format, their indexes, ``config.json``, model cards, hidden files, training state and subfolders (but for
    ``additional_chat_templates``) are not.
    """
    lower = name.lower()
    if lower.startswith(_TEMPLATE_FOLDER):
        return "/" not in lower.removeprefix(_TEMPLATE_FOLDER) and lower.endswith(".jinja")
    return "/" not in lower and not _WEIGHTS_OR_STATE.fullmatch(lower) and _WANTED.fullmatch(lower) is not None


def side_files(files: Iterable[FileStat]) -> list[FileStat]:
    """Those of ``files`` that are side files, in their order."""
    return [file for file in files if is_side_file(file.name)]
