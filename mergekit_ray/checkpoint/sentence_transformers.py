"""The folders of a sentence-transformers model: ``modules.json`` names one for each module after the transformer.

A module's folder holds its ``config.json`` and, where it has any, its weights (``2_Dense``). The names come from a file
of strangers: one that leads out of the model's folder, or to a hidden one, is no module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_side_file
from mergekit_ray.storage.protocols import FileStat, Source

MODULES_NAME = "modules.json"
_SETTINGS_NAME = "config_sentence_transformers.json"
_WEIGHTS_NAME = "model.safetensors"
_PICKLED_NAME = "pytorch_model.bin"
_MAX_MODULES_BYTES = 1 << 20


def module_folders(source: Source, listing: Mapping[str, FileStat]) -> tuple[str, ...]:
    """The folders that ``modules.json`` names; none where there is no such file, or it holds something else.

    Raises:
        CheckpointError, StorageError: it could not be read.
    """
    if MODULES_NAME not in listing:
        return ()
    try:
        modules = json.loads(source.read(MODULES_NAME, max_bytes=_MAX_MODULES_BYTES))
    except (ValueError, RecursionError):
        return ()
    paths = (
        [module.get("path") for module in modules if isinstance(module, Mapping)] if isinstance(modules, list) else []
    )
    found = [path.rstrip("/") for path in paths if isinstance(path, str)]
    return tuple(dict.fromkeys(path for path in found if _is_inside(path)))


def is_module_file(name: str, folders: Sequence[str]) -> bool:
    """Whether a file is part of a module: its config, its weights, or a side file of the kind that models have."""
    folder = next((folder for folder in folders if name.startswith(f"{folder}/")), None)
    if folder is None or not _is_inside(name):
        return False
    base = name.rpartition("/")[2]
    return base in (CONFIG_NAME, _WEIGHTS_NAME) or is_side_file(base)


def module_settings(source: Source, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What files say of modules: which there are, how token embeddings are pooled, what is put before texts.

    By file; one that holds no such thing says nothing.

    Args:
        source: the model's store.
        names: its side files.

    Raises:
        CheckpointError, StorageError: one could not be read.
    """
    found = {}
    for name in names:
        if not name.endswith(f"/{CONFIG_NAME}") and name not in (MODULES_NAME, _SETTINGS_NAME):
            continue
        try:
            content = json.loads(source.read(name, max_bytes=_MAX_MODULES_BYTES))
        except (ValueError, RecursionError):
            continue
        if name == MODULES_NAME:
            content = {"the list of modules": _named(content)}
        if isinstance(content, Mapping):
            found[name] = _with_defaults(content) if name == _SETTINGS_NAME else content
    return found


def _named(modules: object) -> list[str]:
    """Kinds of modules and their folders: what they are, wherever a version keeps its classes."""
    known = [module for module in modules if isinstance(module, Mapping)] if isinstance(modules, list) else []
    kinds = [(str(module.get("type")).rpartition(".")[2], module.get("path")) for module in known]
    return [f"{kind} ({path})" if path else kind for kind, path in kinds]


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's settings changes its embeddings or how they are compared, said or not."""
    prompts = settings.get("prompts")
    return {
        "prompts": {k: text for k, text in prompts.items() if text} if isinstance(prompts, Mapping) else {},
        "default_prompt_name": settings.get("default_prompt_name"),
        "similarity_fn_name": settings.get("similarity_fn_name") or "cosine",
    }


def weights_of_modules(names: Sequence[str]) -> list[str]:
    """Those of a model's side files that are weights of a module after the transformer."""
    return [name for name in names if name.endswith(f"/{_WEIGHTS_NAME}")]


def pickled_modules(listing: Mapping[str, FileStat], folders: Sequence[str]) -> list[str]:
    """Weights of modules stored only in a form whose loading can run code, and so not copied."""
    pickled = [f"{folder}/{_PICKLED_NAME}" for folder in folders if f"{folder}/{_WEIGHTS_NAME}" not in listing]
    return [name for name in pickled if name in listing]


def _is_inside(path: str) -> bool:
    """Whether a path stays in the model's folder, without links, and hides nothing."""
    return "\\" not in path and all(part and not part.startswith(".") for part in path.split("/"))
