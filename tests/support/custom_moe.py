"""Checkpoints that bring their own modelling code: how they are loaded, and what they are compared with."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import dynamic_module_utils

from support.models import load
from support.references.moe import SparseBlock


@contextlib.contextmanager
def code_kept_in(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Has transformers copy the code that models bring along there, and not among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # the package remembers the folder that it was first found in
        yield patch


def load_custom(folder: Path) -> Any:
    """The model in a folder with the code beside it, which must find every weight and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True, trust_remote_code=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert not any(report.get(key) for key in ("error_msgs", "conversion_errors")), report
    return model.eval()


def layers_of(model: Any, stack: str) -> Any:
    """The decoder layers of a dense model by the name that its files have for them."""
    return model.get_submodule(stack)


def reference(
    base: Path,
    sources: Sequence[Path],
    routers: Sequence[torch.Tensor],
    *,
    stack: str,
    last: str,
    num_active: int = 2,
    shared: Path | None = None,
    scales: Sequence[float] | None = None,
) -> Any:
    """A dense model in float32 whose feed-forward modules are replaced by hand.

    Args:
        base: gives everything outside them.
        sources: give the experts.
        routers: by layer.
        stack: name of the list of layers.
        last: name of the linear layer of a feed-forward module that ``scales`` multiply, its bias too.
        num_active: experts per token.
        shared: gives an expert for all tokens.
        scales: one for each expert.
    """
    model = load(base).float()
    loaded = [load(path).float() for path in sources]
    common = None if shared is None else load(shared).float()
    for number, layer in enumerate(layers_of(model, stack)):
        parts: list[nn.Module] = [copy.deepcopy(layers_of(source, stack)[number].mlp) for source in loaded]
        for part, scale in zip(parts, scales or [1.0] * len(parts), strict=True):
            for parameter in part.get_submodule(last).parameters():
                parameter.data.mul_(scale)
        own = None if common is None else copy.deepcopy(layers_of(common, stack)[number].mlp)
        layer.mlp = SparseBlock(parts, routers[number].float(), num_active, own)
    return model.eval()
