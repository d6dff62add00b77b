"""Models of diffusers: a pipeline is a folder of folders with a model in each, and each is merged by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mergekit_ray.checkpoint.side_files import CONFIG_NAME
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.sizes import counted

PIPELINE_NAME = "model_index.json"


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a model of diffusers, which reads weights from files with names of its own."""
    return "_class_name" in config and "_diffusers_version" in config


def pipeline_error(names: Collection[str], reference: str, *, is_folder: bool) -> ModelError | None:
    """What to say of a model's folder that is a whole pipeline; None if it is none.

    Args:
        names: of the files in it.
        reference: the model as the recipe names it.
        is_folder: what is below it can be named like itself, which the folders of a repository of the Hub cannot.
    """
    if PIPELINE_NAME not in names or CONFIG_NAME in names:
        return None
    folders = {name.partition("/")[0] for name in names if name.count("/") == 1 and name.endswith(".safetensors")}
    models = [folder for folder in sorted(folders) if f"{folder}/{CONFIG_NAME}" in names]
    if not models:
        return ModelError(
            f"this is a diffusers pipeline, but no folder in it holds both {CONFIG_NAME} and safetensors files",
            where=reference,
            remedy="load it with diffusers and save it with save_pretrained()",
        )
    listed = ", ".join(f"{reference.rstrip('/')}/{folder}" if is_folder else folder for folder in models)
    return ModelError(
        f"this is a diffusers pipeline, which holds {counted(len(models), 'model')}, and a merge is of one",
        where=reference,
        remedy=f"{'' if is_folder else 'download it, and '}merge its models one at a time: {listed}",
    )
