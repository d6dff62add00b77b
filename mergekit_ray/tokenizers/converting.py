"""Tokenizers as transformers loads them. No network, and no code that comes with a model.

The only module here that imports transformers, which is an optional dependency.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_vocabulary_file
from mergekit_ray.core.errors import MergekitRayError, ModelError, PlanError
from mergekit_ray.tokenizers.files import read, side_files

_CONFIG_KEYS: Final = ("model_type", "tokenizer_class")
_SUFFIXES: Final = (".json", ".model", ".tiktoken", ".spm", ".txt", ".codes", ".jinja")
_MAX_SHOWN: Final = 300


def loaded_by_transformers(checkpoint: Checkpoint) -> Any:
    """The tokenizer beside a model, wherever that is; only its own (small) files are fetched.

    Raises:
        ImportError: transformers is not installed.
        ValueError, or a panic of Rust's: transformers cannot load it.
        ModelError, CheckpointError, StorageError: a file is too large or could not be read.
    """
    import transformers  # noqa: PLC0415 - optional, and slow to import

    with tempfile.TemporaryDirectory(prefix="mergekit-ray-") as name:
        folder = Path(name)
        # What is wrong with the rest of the config is said when the model is made from it.
        config = {key: value for key, value in checkpoint.config.items() if key in _CONFIG_KEYS}
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        for file, (source, stat) in side_files(checkpoint).items():
            if "/" not in file and file.endswith(_SUFFIXES):
                (folder / file).write_bytes(read(source, stat))
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ValueError(what_transformers_said(error, folder, checkpoint)) from error


def what_transformers_said(error: Exception, folder: Path, checkpoint: Checkpoint) -> str:
    """Its message, with the model's name for the temporary folder, and no advice that nobody here can follow."""
    if "trust_remote_code" in str(error):
        return "it needs code that comes with the model, which is not run"
    return str(error).replace(str(folder), checkpoint.reference)


def converted(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``tokenizer.json`` would hold, of a model that has a vocabulary in another form, and its special tokens.

    Returns:
        The content; and what the tokenizer's class, if not the settings, calls each special token: ``bos_token``.

    Raises:
        ModelError: transformers cannot convert it; it names the files and says why.
        PlanError: transformers is not installed.
        CheckpointError, StorageError: a file could not be read.
    """
    names = ", ".join(sorted(filter(is_vocabulary_file, side_files(checkpoint))))
    try:
        loaded = loaded_by_transformers(checkpoint)
        found: dict[str, Any] = json.loads(loaded.backend_tokenizer.to_str())
        special = {key: str(token) for key, token in loaded.special_tokens_map.items()}
    except ImportError as error:
        raise PlanError(
            f"there is no tokenizer.json, only {names}, which transformers converts; it cannot be imported ({error})",
            where=checkpoint.reference,
            remedy="pip install 'mergekit-ray[moe]', or save the tokenizer with transformers beside the model",
        ) from error
    except BaseException as error:  # transformers raises whatever it meets, tokenizers panics, which are no Exceptions
        if isinstance(error, MergekitRayError | KeyboardInterrupt | SystemExit):
            raise
        raise ModelError(
            f"there is no tokenizer.json, and transformers cannot make one of {names}: "
            f"{str(error) or type(error).__name__:.{_MAX_SHOWN}}",
            where=checkpoint.reference,
            remedy="install what transformers asks for (pip install sentencepiece tiktoken protobuf), or load the "
            "tokenizer where that works and save it beside the model with save_pretrained()",
        ) from error
    return found, special
