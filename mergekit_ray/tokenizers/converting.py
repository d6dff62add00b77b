"""Tokenizers without ``tokenizer.json``, converted by transformers. No network, and no code that comes with a model.

The only module here that imports transformers, which is an optional dependency.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_vocabulary_file
from mergekit_ray.core.errors import MergekitRayError, ModelError, PlanError
from mergekit_ray.storage.protocols import FileStat, Source
from mergekit_ray.tokenizers.files import read

_CONFIG_KEYS = ("model_type", "tokenizer_class")
_MAX_SHOWN = 300


def converted(checkpoint: Checkpoint, files: Mapping[str, tuple[Source, FileStat]]) -> dict[str, Any]:
    """What ``tokenizer.json`` would hold.

    Args:
        checkpoint: the model.
        files: where each of its tokenizer's files lies; see `tokenizers.files.tokenizer_files`.

    Raises:
        ModelError: transformers cannot convert it; it names the files and says why.
        PlanError: transformers is not installed.
        CheckpointError, StorageError: a file could not be read.
    """
    names = ", ".join(sorted(filter(is_vocabulary_file, files)))
    try:
        import transformers  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise PlanError(
            f"there is no tokenizer.json, only {names}, which transformers converts; it cannot be imported ({error})",
            where=checkpoint.reference,
            remedy="pip install mergekit-ray[moe], or save the tokenizer with transformers beside the model",
        ) from error
    with tempfile.TemporaryDirectory(prefix="mergekit-ray-") as name:
        folder = Path(name)
        config = {key: value for key, value in checkpoint.config.items() if key in _CONFIG_KEYS}
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        for file, (source, stat) in files.items():
            if "/" not in file:
                (folder / file).write_bytes(read(source, stat))
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            found: dict[str, Any] = json.loads(loaded.backend_tokenizer.to_str())
        except (
            BaseException
        ) as error:  # transformers raises whatever it meets, tokenizers panics, which are no Exceptions
            if isinstance(error, MergekitRayError | KeyboardInterrupt | SystemExit):
                raise
            raise ModelError(
                f"there is no tokenizer.json, and transformers cannot make one of {names}: {_said(error, folder)}",
                where=checkpoint.reference,
                remedy="install what transformers asks for (pip install sentencepiece tiktoken protobuf), or load the "
                "tokenizer where that works and save it beside the model with save_pretrained()",
            ) from error
    return found


def _said(error: BaseException, folder: Path) -> str:
    """What transformers said, without the temporary folder and advice that nobody here can follow."""
    if "trust_remote_code" in str(error):
        return "it needs code that comes with the model, which is not run"
    return f"{(str(error) or type(error).__name__).replace(str(folder), 'the model'):.{_MAX_SHOWN}}"
