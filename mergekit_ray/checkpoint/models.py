"""All models that a recipe names, opened at once."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from mergekit_ray.checkpoint.adapter import Adapter, adapted, open_adapter
from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.config.reference import ModelReference, escaped
from mergekit_ray.core.errors import ModelError, StorageError
from mergekit_ray.storage.opening import open_source


def open_models(
    references: Sequence[ModelReference], stages: Collection[str] = (), *, allow_raw: bool = False
) -> dict[ModelReference, Checkpoint]:
    """Headers and configs of models and of the adapters on them, fetched concurrently; a shared base only once.

    Args:
        references: the models.
        stages: paths that name no model. Of an adapter on one, the adapter alone is opened, and the rest is empty.
        allow_raw: see `open_checkpoint`; not for models with an adapter, which is applied by what a config says.

    Raises:
        ModelError, CheckpointError, StorageError: naming the model or the adapter.
    """
    plain = (replace(reference, lora=None) for reference in references)
    bases = list(dict.fromkeys(base for base in plain if base.path not in stages))
    loras = list(dict.fromkeys(reference.lora for reference in references if reference.lora is not None))
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(bases) + len(loras))) as executor:
            opened = executor.map(partial(_open_base, allow_raw=allow_raw), bases)
            adapters = executor.map(_open_adapter, loras)
            checkpoint_of = dict(zip(bases, opened, strict=True))
            adapter_of = dict(zip(loras, adapters, strict=True))
    except (ModelError, StorageError) as error:  # a name that is no folder is looked for on the Hub
        hints = [f"for the folder {folder}, write {escaped(folder)}" for folder in _folders_with_plus(references)]
        error.remedy = "; ".join([*([error.remedy] if error.remedy else []), *hints]) or None
        raise

    def found(reference: ModelReference) -> Checkpoint:
        base = checkpoint_of.get(replace(reference, lora=None))
        if reference.lora is None:
            assert base is not None
            return base
        if base is not None and base.is_raw:
            raise ModelError(
                "an adapter is applied to a model with a config.json, and this one has none",
                where=str(reference),
                remedy="leave out the adapter; files of adapters can be merged with each other, named as models",
            )
        adapter = adapter_of[reference.lora]
        nothing = Checkpoint(adapter.checkpoint.source, reference.path, {}, {}, {}, ())
        return adapted(nothing if base is None else base, adapter)

    return {reference: found(reference) for reference in references}


def _folders_with_plus(references: Sequence[ModelReference]) -> list[str]:
    """The folders that a reference would name if its plus did not stand before an adapter."""
    whole = [f"{each.path}+{each.lora.path}" for each in references if each.lora is not None]
    return [path for path in dict.fromkeys(whole) if os.path.isdir(os.path.expanduser(path))]  # noqa: PTH111, PTH112


def _open_base(reference: ModelReference, *, allow_raw: bool) -> Checkpoint:
    source = open_source(reference.path, revision=reference.revision)
    return open_checkpoint(source, str(reference), allow_raw=allow_raw)


def _open_adapter(reference: ModelReference) -> Adapter:
    return open_adapter(open_source(reference.path, revision=reference.revision), str(reference))
